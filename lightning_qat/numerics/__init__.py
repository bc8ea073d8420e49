"""What quantization computes: pure functions of tensors and their fused CPU loops."""
