"""AMCT's record, as text and binary: read, and applied to a float model to the bit."""

import random
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.amct.apply_record import _set_layer, apply_record
from lightning_qat.amct.layer_record import LayerRecord
from lightning_qat.amct.record import encode_record, format_record, read_record
from lightning_qat.amct.record_fit import LayerFactors, fit_record
from lightning_qat.cli.own_formats import inspect_own
from lightning_qat.convert.convert import convert
from lightning_qat.ir.recurrence import GATES
from lightning_qat.prepare.prepare import prepare
from reliability.fuzz.mutate_bytes import mutate_bytes
from reliability.fuzz.mutate_text import mutate_text
from reliability.fuzz.reader import Reader

_EVERY = 500
"""Of one of so many files the first layer is converted too, which takes a second."""


class _Net(nn.Module):
    """A layer of every kind that a record has, one in front of a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 1, groups=2)
        self.rnn = nn.LSTM(4, 2)
        self.fc = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.norm(self.conv(x)))).flatten(2).permute(2, 0, 1)
        out: Tensor = self.fc(self.rnn(x)[0])
        return out


_INPUT = torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2)
_RECORD = (
    LayerRecord("conv", 0.0078125, -3, (0.01, 0.02, 0.03, 0.04)),
    LayerRecord("up", 0.03, -128, (0.01,), wts_type="INT4"),
    LayerRecord("rnn", 0.02, 4, (0.1, 0.2, 0.3, 0.4), "INT8", "INT8", 0.01, 1, (0.5,)),
    LayerRecord("fc", 0.0001, 0, (0.1, 0.2, 0.3), act_type="INT16"),
)


def _seeds(folder: Path) -> Sequence[Path]:
    _convert(_RECORD[:1])  # the first time takes far longer
    names = ("record.txt", "record.pb", "one.txt")
    (folder / names[0]).write_text(format_record(_RECORD))
    (folder / names[1]).write_bytes(encode_record(_RECORD))
    (folder / names[2]).write_text(format_record(_RECORD[:1]))
    return [folder / name for name in names]


def _mutate(content: bytes, generator: random.Random) -> bytes:
    return (mutate_bytes if content.startswith(b"\n") else mutate_text)(content, generator)


def _float_model() -> _Net:
    torch.manual_seed(0)
    model = _Net().eval()
    assert model.norm.running_var is not None
    model.norm.running_var.uniform_(0.1, 4)
    return model


def _read(path: Path) -> None:
    record = read_record(path)
    inspect_own(path)
    model = _float_model()
    fitting, recipe = fit_record(model, record, {model.conv: None})
    prepare(model, recipe)
    for factors in fitting:
        _set_layer(factors)
    for factors in fitting:
        _check_quantizers(factors)
    if zlib.crc32(path.read_bytes()) % _EVERY == 0:
        _convert([entry for entry in record if entry.name == "conv"])


def _convert(record: Sequence[LayerRecord]) -> None:
    """The layer in front of the batch norm alone: an LSTM takes too long."""
    model = nn.Sequential(OrderedDict([*_float_model().named_children()][:2]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of integers that saturate
        apply_record(model, record, _INPUT)
        converted = convert(model, _INPUT)
    for entry in record:
        found = converted.tensors["conv.input"].qparams
        _check(entry.name, found.scale, (entry.scale_d,))
        assert int(found.zero_point) == entry.offset_d, (entry, found)
        _check(entry.name, converted.tensors["conv.weight"].qparams.scale, entry.scale_w)


def _check_quantizers(factors: LayerFactors) -> None:
    layer: Any = factors.module
    entry = factors.entry
    inputs = [(layer.input_quantizer, entry.scale_d, entry.offset_d)]
    if entry.scale_h is not None and entry.offset_h is not None:
        inputs.append((layer.hidden_quantizer_l0, entry.scale_h, entry.offset_h))
    for quantizer, scale, offset in inputs:
        qparams = quantizer.qparams()
        _check(entry.name, qparams.scale, (scale,))
        assert int(qparams.zero_point) == offset, (entry, qparams)
    for name, scales in _weights(entry):
        child = name.replace("weight", "weight_quantizer", 1)
        found = layer.get_submodule(child).qparams(getattr(layer, name)).scale
        _check(entry.name, found, scales)


def _weights(entry: LayerRecord) -> Iterator[tuple[str, tuple[float, ...]]]:
    if entry.scale_h is None:
        yield "weight", entry.scale_w
        return
    for name, scales in (("weight_ih_l0", entry.scale_w), ("weight_hh_l0", entry.scale_r)):
        gates = GATES["LSTM"]
        rows = len(scales) // len(gates)
        # What stands for torch's first gate stands where ONNX has that gate.
        places = [
            gates.index(gate) * rows + row for gate in range(len(gates)) for row in range(rows)
        ]
        yield name, tuple(scales[place] for place in places) if rows else scales


def _check(layer: str, found: Tensor, scales: tuple[float, ...]) -> None:
    """Every channel has the file's number, to the bit; one number may stand for several rows."""
    wanted = torch.tensor(scales)
    if found.numel() > len(scales):
        wanted = wanted.repeat_interleave(found.numel() // len(scales))
    assert torch.equal(found.reshape(-1), wanted), f"{layer}: {found.tolist()} is not {scales}"


READER = Reader("record", _seeds, _mutate, _read, (ValueError,))
