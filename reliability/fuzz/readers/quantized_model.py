"""Converted models (``.pt2``), loaded as one from elsewhere: without trust."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from reliability.fuzz.mutate_torch import mutate_torch
from reliability.fuzz.reader import Reader


class _Tiny(nn.Module):
    """Has a symbolic size that is computed, a dictionary and an operator with a text."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = nn.functional.gelu(self.linear(x), approximate="tanh")
        return {"rows": torch.cat((y, y))}


def _seeds(folder: Path) -> Sequence[Path]:
    paths = []
    for name, module in (("tiny", _Tiny()), ("linear", nn.Linear(3, 2))):
        x = torch.ones(2, 3)
        prepare(module, "int8", x)
        module.train()(x)
        path = folder / f"{name}.pt2"
        convert(module.eval(), x).save(path)
        paths.append(path)
    return paths


def _read(path: Path) -> object:
    model = QuantizedModel.load(path)
    return model.fingerprint, model.tensors, model.layers


READER = Reader("quantized_model", _seeds, mutate_torch, _read, (ValueError,))
