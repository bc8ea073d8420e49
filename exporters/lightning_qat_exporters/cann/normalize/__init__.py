"""Bring a QDQ graph of any tool to one form, one pass per file."""
