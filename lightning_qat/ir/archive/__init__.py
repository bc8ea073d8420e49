"""Refuse a ``.pt2`` file that could run code or exhaust memory when torch loads it."""
