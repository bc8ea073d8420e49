"""Readers of files are given broken files, and may finish or raise a documented error."""
