"""Deploy files that the exporter writes pass the lint: every network, every layer and preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import convert, export, prepare
from lightning_qat.recipe.recipe import PRESETS
from lightning_qat_exporters import CannExporter
from lightning_qat_exporters.cann import exporter as exporter_module
from tests import join_networks, models


class Recurrent(nn.Module):
    """A recurrent layer and a head; takes (batch, 4, 3)."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    **models.NETWORKS,
    **join_networks.NETWORKS,
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 3)),
    "gru": (lambda: Recurrent(nn.GRU), (4, 3)),
}


# Every kind of layer and of join; the others repeat these.
KINDS = (
    *("linear_3d", "depthwise", "residual_add", "mobilenet_v3_block", "inception"),
    *("encoder_block", "lstm", "gru"),
)
CASES = [
    (network, preset)
    for network in NETWORKS
    for preset in PRESETS
    if preset == "int8" or network in KINDS
]


@pytest.mark.parametrize(("network", "preset"), CASES)
def test_what_the_exporter_writes_has_no_lint_errors(
    network: str, preset: str, tmp_path: Path
) -> None:
    make, shape = NETWORKS[network]
    torch.manual_seed(0)
    net, x = make(), torch.randn(4, *shape)
    prepare(net, preset, x)
    net.train()(x)
    exporter = CannExporter(int4_weights=preset == "w4a8")
    artifact = exporter.export(convert(net, x), tmp_path / "net")
    errors = [f for f in exporter.lint(artifact.files["model"]) if f.severity == "error"]
    # For 16 bits CANN's sources register no AscendQuant; the export says so, too.
    assert [str(finding) for finding in errors if "INT16" not in finding.got] == []
    assert bool(errors) == (preset == "a16w8")


def test_an_export_says_at_once_what_cann_does_not_take(tmp_path: Path) -> None:
    class Dilated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.max_pool2d(self.conv(x), 2, dilation=2)

    x = torch.randn(2, 3, 8, 8)
    model = Dilated()
    prepare(model, "int8", x)
    model.train()(x)
    notes = export(convert(model.eval(), x), "cann", tmp_path / "net").notes
    (note,) = [note for note in notes if "CANN does not take it" in note]
    assert note.startswith("'/MaxPool': ")
    assert "dilations" in note


def test_a_file_that_is_too_large_to_be_linted_at_once_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter_module, "_LINTED", 100)
    x = torch.randn(2, 6)
    model = nn.Sequential(nn.Linear(6, 3))
    prepare(model, "int8", x)
    model.train()(x)
    notes = export(convert(model.eval(), x), "cann", tmp_path / "net").notes
    assert any("lightning-qat lint" in note and "net_deploy_model.onnx" in note for note in notes)
