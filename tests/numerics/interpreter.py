"""Triton's interpreter in the place of a GPU: the kernels run on tensors of a CPU."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lightning_qat.numerics.gpu import launch


def kernel_modules() -> list[ModuleType]:
    """The modules with kernels, in the order in which one imports the other."""
    pytest.importorskip("triton", reason="Triton is not installed")
    names = ("kernels", "weight_kernels")
    return [importlib.import_module(f"lightning_qat.numerics.gpu.{name}") for name in names]


@contextmanager
def interpreted() -> Iterator[None]:
    """Run every quantizer in the block as kernels, by Triton's interpreter."""
    modules = kernel_modules()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # NumPy says so where a GPU does not: NaN that becomes an integer, overflow to infinity.
        for said in ("invalid value", "overflow", "divide by zero"):
            warnings.filterwarnings("ignore", f"{said} encountered", RuntimeWarning)
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(launch, "INTERPRETED", True)
        _interpret_standard_functions(patch)
        _round_to_bfloat16(patch)
        try:
            for module in modules:
                importlib.reload(module)
            yield
        finally:
            patch.delenv("TRITON_INTERPRET")
            for module in modules:
                importlib.reload(module)


def _interpret_standard_functions(patch: pytest.MonkeyPatch) -> None:
    """Triton's own functions, such as ``tl.sum``, were made for a GPU when it was imported."""
    from triton import language
    from triton.language import standard
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for name, function in list(vars(standard).items()):
        if isinstance(function, JITFunction):
            for module in (standard, language):
                if hasattr(module, name):
                    patch.setattr(module, name, InterpretedFunction(function.fn))


def _round_to_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Triton 3.7's interpreter cuts off what a GPU rounds (``cvt.rn.bf16.f32``)."""
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (language.float32, language.bfloat16):
            return convert(values, source, target, rounding)
        given = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        return given.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    patch.setattr(interpreter, "_convert_float", converted)
