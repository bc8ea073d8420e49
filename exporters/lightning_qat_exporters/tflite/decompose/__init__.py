"""Decompositions of what LiteRT lacks to operators it has; both backends use them."""
