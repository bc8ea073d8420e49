"""LSTM and GRU in TFLite files: steps unrolled, integers as they are, gates in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import QuantizedModel, Recipe, convert, export, prepare, verify
from lightning_qat_exporters import TFLiteExporter
from lightning_qat_exporters.tflite.flatbuffer.file import read

pytest.importorskip("litert_torch")
# One worker pays for the import.
pytestmark = pytest.mark.xdist_group("tflite")

STEPS = 2
"""One that reads the state that is given, and one that reads what was computed."""


class Encoder(nn.Module):
    """A recurrent layer that starts at zero, and a head over all steps."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], **options: Any) -> None:
        super().__init__()
        self.rnn: Any = kind(3, 4, batch_first=True, **options)
        self.head = nn.Linear(8 if self.rnn.bidirectional else 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def trained(net: nn.Module, *inputs: Tensor, recipe: Any = "int8") -> nn.Module:
    prepare(net, recipe, inputs)
    for _ in range(2):
        net.train()(*inputs)
    return net.eval()


def assert_the_same(model: QuantizedModel, folder: Path) -> set[str]:
    """Numbers equal to the bit, outputs within a step; returns the file's operators."""
    exporter = TFLiteExporter(backend="litert")
    artifact = export(model, exporter, folder / "net")
    agreement = verify(model, artifact, exporter=exporter)
    assert agreement.parameters_equal, agreement
    assert agreement.max_steps <= 1.001, agreement
    return {op.kind for op in read(artifact.files["model"].read_bytes()).operators}


@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.LSTM, {}), (nn.GRU, {"num_layers": 2, "bidirectional": True})],
    ids=["LSTM", "GRU, 2 layers, 2 directions"],
)
def test_a_layer_that_starts_at_zero(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    x = torch.randn(4, STEPS, 3)
    kinds = assert_the_same(convert(trained(Encoder(kind, **options), x), x), tmp_path)
    assert {"FULLY_CONNECTED", "LOGISTIC", "TANH"} <= kinds
    # No mark is left, and none was computed on the constants of the first step.
    assert not kinds & {"CEIL", "SIN", "COS"}


def test_hidden_state_and_output_on_one_grid_are_both_rounded(tmp_path: Path) -> None:
    x = torch.randn(4, STEPS, 3)
    net: Any = trained(Encoder(nn.LSTM), x, recipe=Recipe(joins=False, outputs=False))
    hidden = net.rnn.hidden_quantizer_l0
    net.head.input_quantizer.min_val.copy_(hidden.min_val)
    net.head.input_quantizer.max_val.copy_(hidden.max_val)
    assert_the_same(convert(net, x), tmp_path)


class Streaming(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        output, (h, c) = self.rnn(x, (h, c))
        return output, h, c


def test_a_layer_that_takes_and_gives_its_state(tmp_path: Path) -> None:
    inputs = torch.randn(1, STEPS, 3), torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    model = convert(trained(Streaming(), *inputs), inputs, dynamic_batch=False)
    assert_the_same(model, tmp_path)
