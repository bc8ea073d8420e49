"""Read JSON and YAML from elsewhere as plain data of bounded size and known shape."""
