"""Float ONNX files of the nets, for tools that quantize ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.tool_files.nets import batches, nets

Batches = list[dict[str, NDArray[np.float32]]]


def float_files() -> Iterator[tuple[str, Path, Batches]]:
    """Name of a net, its file, batches by input name; the files are gone at the end."""
    with TemporaryDirectory() as folder:
        for name, net, x in nets():
            path = Path(folder) / f"{name}.onnx"
            torch.onnx.export(net, (x,), path, opset_version=17, dynamo=False, input_names=["x"])
            yield name, path, [{"x": batch.numpy()} for batch in batches(x)]
