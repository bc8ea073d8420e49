"""ONNX Runtime's ``quantize_static`` with the options that change what is in the file."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from benchmarks.tool_files.float_onnx import Batches, float_files
from benchmarks.tool_files.tool import Write

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "channels": {"per_channel": True},
    "uint8": {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8},
    "symmetric": {"extra_options": {"ActivationSymmetric": True, "WeightSymmetric": True}},
    "pairs": {"per_channel": True, "extra_options": {"AddQDQPairToWeight": True}},
    "dedicated": {"extra_options": {"DedicatedQDQPair": True, "QDQKeepRemovableActivations": True}},
    "float_bias": {"per_channel": True, "extra_options": {"QuantizeBias": False}},
}


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # not typed
    """Hands out batches once."""

    def __init__(self, batches: Batches) -> None:
        self._rest = iter(batches)

    def get_next(  # pyright: ignore[reportIncompatibleMethodOverride]  # None is the end there, too
        self,
    ) -> dict[str, NDArray[np.float32]] | None:
        return next(self._rest, None)


def files() -> Iterator[tuple[str, Write]]:
    """Every net with every set of options."""
    for name, source, batches in float_files():
        for tag, options in OPTIONS.items():
            yield f"{name}_{tag}", partial(_quantize, source, batches, options)


def _quantize(source: Path, batches: Batches, options: dict[str, Any], path: Path) -> None:
    settings: dict[str, Any] = {"activation_type": QuantType.QInt8, **options}
    quantize_static(source, path, _Reader(batches), quant_format=QuantFormat.QDQ, **settings)
