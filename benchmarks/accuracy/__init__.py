"""Accuracy after quantization-aware training and after calibration, on several tasks and tools."""
