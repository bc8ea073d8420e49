"""Check a deploy file against ATC's known rules, where no device is at hand."""
