"""A deploy model as standard operators, for ONNX Runtime; shares nothing with the executor."""
