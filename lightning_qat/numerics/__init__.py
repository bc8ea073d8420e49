"""The computations of quantization: pure functions of tensors and fused CPU loops."""
