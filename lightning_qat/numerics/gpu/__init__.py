"""Triton kernels of fake quantization, one launch per tensor, and what launches them."""
