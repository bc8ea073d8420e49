"""A fit that calibrates and trains nothing."""
