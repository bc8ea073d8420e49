"""The tools whose files are converted: what they are called, and how to install them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias, cast

Write: TypeAlias = Callable[[Path], object]
"""Writes one file of a tool; what it raises is the tool's own failure."""


@dataclass(frozen=True)
class Tool:
    """One tool, or one way to export from it.

    Args:
        name: As it stands in the table.
        packages: Distributions that it needs; the versions of the first two are printed.
        install: The command that installs it.
        module: In this folder; its ``files()`` gives names and functions that write files.
        grid_weights: Convert with this option: the tool writes weights as float.
        refused: ``True``: these files are no integers, and a message must say what to do.
    """

    name: str
    packages: tuple[str, ...]
    install: str
    module: str
    grid_weights: bool = False
    refused: bool = False

    def versions(self) -> str | None:
        """Name and version of the tool; ``None``: it is not installed."""
        try:
            found = [f"{p} {version(p).partition('+')[0]}" for p in self.packages]
        except PackageNotFoundError:
            return None
        return ", ".join(found[:2])

    def files(self) -> Iterator[tuple[str, Write]]:
        """Names of files without suffix, and what writes each."""
        module = import_module(f"benchmarks.tool_files.{self.module}")
        return cast(Iterator[tuple[str, Write]], module.files())


_MODELOPT = "pip install nvidia-modelopt"
_ONNX_MODELOPT = f"{_MODELOPT} onnx-graphsurgeon onnxconverter-common polygraphy lief cppimport"

TOOLS: Mapping[str, Tool] = {
    "onnxruntime": Tool(
        "ONNX Runtime `quantize_static`",
        ("onnxruntime",),
        "pip install onnxruntime",
        "onnxruntime_static",
    ),
    "torch-ao": Tool("torch.ao FX", ("torch",), "pip install torch", "torch_ao"),
    "torchao": Tool("torchao PT2E", ("torchao",), "pip install torchao", "torchao_pt2e"),
    "brevitas": Tool("Brevitas", ("brevitas",), "pip install brevitas", "brevitas_qcdq"),
    "brevitas-few-bits": Tool(
        "Brevitas, 4 and 2 bits", ("brevitas",), "pip install brevitas", "brevitas_few_bits"
    ),
    "nncf": Tool("NNCF", ("nncf",), "pip install nncf", "nncf_files"),
    "modelopt": Tool("ModelOpt, torch", ("nvidia-modelopt",), _MODELOPT, "modelopt_torch"),
    "modelopt-onnx": Tool(
        "ModelOpt, ONNX",
        ("nvidia-modelopt", "onnx-graphsurgeon", "onnxconverter-common", "polygraphy", "lief"),
        _ONNX_MODELOPT,
        "modelopt_onnx",
    ),
    "modelopt-fp8": Tool(
        "ModelOpt, FP8", ("nvidia-modelopt",), _MODELOPT, "modelopt_fp8", refused=True
    ),
    "aimet": Tool("AIMET", ("aimet-torch",), "pip install aimet-torch", "aimet_qdq"),
    "tensorflow": Tool(
        "TensorFlow QAT",
        ("tensorflow-model-optimization", "tf2onnx", "tensorflow-cpu", "tf-keras"),
        "pip install tensorflow-cpu tf-keras tensorflow-model-optimization tf2onnx",
        "tensorflow_qat",
        grid_weights=True,
    ),
    "tflite": Tool(
        "TFLite through tf2onnx",
        ("tf2onnx", "tensorflow-cpu"),
        "pip install tensorflow-cpu tf-keras tensorflow-model-optimization tf2onnx",
        "tflite_files",
    ),
}
