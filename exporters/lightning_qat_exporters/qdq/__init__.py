"""From our IR to one QDQ graph; both ONNX exporters start from it."""
