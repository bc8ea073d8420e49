"""Exporters of third parties that do what they should not. Child processes import them."""

import ctypes
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_qat.export.protocol import Artifact
from lightning_qat.ir.quantized_model import QuantizedModel


class Text:
    """Writes one small file, and first does something."""

    def __init__(self, name: str = "text", first: Callable[[QuantizedModel], Any] | None = None):
        self.name, self.first = name, first

    def check_available(self) -> None: ...

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        path = path_prefix.with_name(f"{path_prefix.name}_{self.name}.txt")
        if self.first is not None:
            returned = self.first(model)
            if returned is not None:
                return returned(path)  # type: ignore[no-any-return]
        path.write_text(self.name, encoding="utf-8")
        return Artifact(self.name, {"model": path})


class WithoutText(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class OfItsOwn(BaseException):
    pass


def raises(error: BaseException) -> Callable[[QuantizedModel], Any]:
    def first(model: QuantizedModel) -> Any:
        raise error

    return first


def returns(make: Callable[[Path], Any]) -> Callable[[QuantizedModel], Any]:
    return lambda model: make


def named(path: Callable[[Path], Any], **more: Any) -> Callable[[QuantizedModel], Any]:
    return returns(lambda written: Artifact("odd", {"model": path(written)}, **more))


def hangs(model: QuantizedModel) -> None:
    time.sleep(600)


def crashes(model: QuantizedModel) -> None:
    ctypes.string_at(0)


def ends_the_process(model: QuantizedModel) -> None:
    os._exit(0)


def raises_what_cannot_be_sent(model: QuantizedModel) -> None:
    class Local(Exception):
        pass

    raise Local("made here")


def prints(model: QuantizedModel) -> None:
    print("a remark")


def leaves_the_folder(model: QuantizedModel) -> None:
    os.chdir("/")


def closes_the_output(model: QuantizedModel) -> None:
    sys.stdout.close()
    os.close(2)


def changes_torch(model: QuantizedModel) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)


def changes_a_number(model: QuantizedModel) -> None:
    next(iter(model.tensors.values())).qparams.scale.mul_(2)


def changes_the_graph(model: QuantizedModel) -> None:
    graph = model.program.graph
    with graph.inserting_before(graph.output_node()):
        graph.call_function(torch.neg, (next(iter(graph.nodes)),))


def changes_the_example(model: QuantizedModel) -> None:
    args, _ = model.example_inputs
    args[0].zero_()
