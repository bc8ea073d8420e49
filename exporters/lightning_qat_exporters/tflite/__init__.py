"""LiteRT files by two backends: TinyNeuralNetwork and litert-torch."""

from lightning_qat_exporters.tflite.exporter import TFLiteExporter

__all__ = ["TFLiteExporter"]
