"""What must hold of an ONNX file before anything else reads it: sizes, order, ONNX's rules."""
