"""Quantized ONNX files written by hand, converted and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tests.exporters.cann.qdq_graphs import Qdq, proto


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "qat.onnx")
    return folder / "qat.onnx"


def net_file(net: Qdq, folder: Path, *outputs: str) -> Path:
    return saved(proto(net.model(*outputs)), folder)


# ----------------------------------------------------------------------------------------------
# Bad input


def fc(scale: Any = 0.5, zero: Any = 0, dtype: Any = np.int8, **changes: Any) -> Qdq:
    """One layer, with the given factors of its input."""
    net = Qdq([2, 2])
    factors = [net.constant(scale, np.float32), net.constant(zero, dtype)]
    quantized = net.node("QuantizeLinear", "x", *factors, name="q")
    other = [net.constant(changes.get("other_scale", scale), np.float32), factors[1]]
    data = net.node("DequantizeLinear", quantized, *other, name="dq")
    weight = net.weight([[1, 2], [3, 4]], changes.get("scale_w", 0.5))
    net.node("MatMul", data, weight, name="fc")
    return net
