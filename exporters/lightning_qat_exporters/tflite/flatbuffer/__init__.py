"""Read and write a TFLite file, and find the converted model's tensors in it."""
