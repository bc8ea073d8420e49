"""Architectures that we did not write, small and with random weights, for ``benchmarks.zoo``."""
