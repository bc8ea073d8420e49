"""Check a QDQ file against TensorRT's written rules, where no NVIDIA device is at hand."""
