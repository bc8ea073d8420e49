"""Which tensors share a quantizer: found by one forward, kept as a plan, applied to a model."""
