"""TFLite files of integers, read by tf2onnx."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tensorflow as tf
import tf2onnx
from numpy.typing import NDArray

from benchmarks.tool_files.keras_nets import nets
from benchmarks.tool_files.tool import Write


def files() -> Iterator[tuple[str, Write]]:
    """Every net with float inputs and outputs, and with integers there."""
    for name, net, x in nets():
        yield f"{name}_float_io", partial(_quantize, net, x, tf.float32)
        yield f"{name}_int8_io", partial(_quantize, net, x, tf.int8)


def _quantize(net: Any, x: NDArray[np.float32], io: Any, path: Path) -> None:
    converter = tf.lite.TFLiteConverter.from_keras_model(net)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([x[n : n + 2]] for n in range(0, len(x), 2))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = io
    from_tflite(converter.convert(), path)


def from_tflite(content: bytes, path: Path) -> None:
    """Let tf2onnx write a TFLite file as ONNX."""
    with TemporaryDirectory() as folder:
        source = Path(folder) / "net.tflite"
        source.write_bytes(content)
        tf2onnx.convert.from_tflite(str(source), opset=17, output_path=str(path))
