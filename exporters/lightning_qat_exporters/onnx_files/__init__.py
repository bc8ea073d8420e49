"""Read, write and run ONNX files."""
