"""TensorFlow Model Optimization: trained with fake quantizers, by tf2onnx, and by TFLite."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf2onnx
from numpy.typing import NDArray

from benchmarks.tool_files.keras_nets import nets
from benchmarks.tool_files.tflite_files import from_tflite
from benchmarks.tool_files.tool import Write


def files() -> Iterator[tuple[str, Write]]:
    """Every net from Keras, and from the TFLite file that is made of it."""
    for name, net, x in nets():
        yield f"{name}_keras", partial(_quantize, net, x, False)
        yield f"{name}_tflite", partial(_quantize, net, x, True)


def _quantize(net: Any, x: NDArray[np.float32], tflite: bool, path: Path) -> None:
    model = tfmot.quantization.keras.quantize_model(net)
    model.compile("sgd", "mse")
    model.fit(x, np.zeros_like(net.predict(x, 2, verbose=0)), 2, epochs=2, verbose=0)
    if tflite:
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        from_tflite(converter.convert(), path)
        return
    signature = [tf.TensorSpec((2, *x.shape[1:]), tf.float32, "x")]
    tf2onnx.convert.from_keras(model, signature, opset=17, output_path=str(path))
