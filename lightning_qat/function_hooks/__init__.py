"""Quantize the inputs of functional calls while a forward runs (``TorchFunctionMode``)."""
