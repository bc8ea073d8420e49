"""What CANN's ONNX plugins refuse, or read otherwise than ONNX, operator by operator."""
