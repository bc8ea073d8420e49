"""Rewrites of the captured graph, in place; ``convert.PASSES`` says in which order."""
