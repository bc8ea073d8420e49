"""Errors of memory are named as such wherever they come from, with a way to go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_qat import convert, export, prepare, verify
from lightning_qat.convert.capture import CaptureError
from lightning_qat.convert.convert import check_capture
from lightning_qat.export.protocol import Artifact
from lightning_qat.insight.compare import compare
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.out_of_memory import OutOfMemory, memory_error_in, naming_memory_errors

ERRORS: dict[str, Callable[[], BaseException]] = {
    "Python": MemoryError,
    "NumPy": lambda: np._core._exceptions._ArrayMemoryError((2**40, 2**20), np.dtype("f4")),  # type: ignore[attr-defined]
    "torch on a CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CUDA elsewhere": lambda: RuntimeError("CUDA error: out of memory"),
    "ONNX Runtime": lambda: RuntimeError("Failed to allocate memory for a buffer of size 9"),
    "C++": lambda: RuntimeError("std::bad_alloc"),
}


class Hungry(nn.Module):
    """Raises what it is told to while it is captured."""

    error: BaseException | None = None

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        if self.error is not None and torch.compiler.is_exporting():
            raise self.error
        result: Tensor = self.fc(x)
        return result


def trained() -> Hungry:
    model = Hungry()
    prepare(model, "int8", torch.randn(2, 4))
    model(torch.randn(2, 4))
    return model


@pytest.mark.parametrize("kind", ERRORS)
def test_a_capture_without_memory_is_not_said_to_be_impossible(kind: str) -> None:
    model, x = trained(), torch.randn(2, 4)
    model.error = ERRORS[kind]()
    for call in (convert, check_capture):
        with pytest.raises(OutOfMemory, match=r"smaller example batch.*lightning-qat export") as e:
            call(model, x)
        assert memory_error_in(e.value) is not None
        assert "captur" not in str(e.value) or call is check_capture
    model.error = ValueError("another")
    with pytest.raises(CaptureError, match="another"):
        convert(model, x)
    model.error = None
    assert convert(model, x)(x).shape == (2, 3)


def test_a_real_allocation_that_is_too_large_is_recognised() -> None:
    with pytest.raises(OutOfMemory, match=r"while trying.*Smaller"):
        with naming_memory_errors("trying", "Smaller."):
            torch.empty(2**50)
    with pytest.raises(OutOfMemory, match=r"while trying.*Smaller"):
        with naming_memory_errors("trying", "Smaller."):
            np.empty(2**50)


def test_what_is_no_error_of_memory_passes_as_it_is() -> None:
    for error in (ValueError("memory of a device"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            with naming_memory_errors("trying", "Smaller."):
                raise error
        assert caught.value is error


def test_the_innermost_says_what_was_done() -> None:
    with pytest.raises(OutOfMemory, match="while reading"):
        with naming_memory_errors("exporting", "X."), naming_memory_errors("reading", "Y."):
            raise MemoryError


class Failing:
    """An exporter, and a reader and runner of its files, without memory."""

    name = "failing"

    def check_available(self) -> None:
        """It is."""

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        """Fail."""
        raise RuntimeError("std::bad_alloc")

    def read_parameters(self, artifact: Artifact) -> Mapping[str, Any]:
        """Fail."""
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def test_an_export_and_a_comparison_say_so_too(tmp_path: Path) -> None:
    model, x = trained(), torch.randn(2, 4)
    quantized = convert(model, x)
    with pytest.raises(OutOfMemory, match=r"target 'failing' .*bad_alloc.*lightning-qat export"):
        export(quantized, Failing(), tmp_path / "net")
    artifact = export(quantized, "fake_quant_onnx", tmp_path / "net")

    def fails(*_: object) -> None:
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedModel, "_module", property(fails))
        with pytest.raises(OutOfMemory, match=r"comparing a file with the model.*fewer inputs"):
            verify(quantized, artifact)
    with pytest.raises(OutOfMemory, match=r"comparing two models.*smaller batch"):
        compare(model, None, _Unreadable())  # type: ignore[arg-type]


class _Unreadable:
    """Inputs that take all memory when they are looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise MemoryError
