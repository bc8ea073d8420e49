"""``apply_record`` on recurrent layers, and on models that it does not take."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_qat.amct.apply_record import apply_record
from lightning_qat.amct.layer_record import LayerRecord
from lightning_qat.amct.record import parse_record
from lightning_qat.convert.convert import convert
from lightning_qat.prepare.prepare import prepare
from lightning_qat_exporters import CannExporter
from tests.exporters.cann.amct_goldens import load_case
from tests.exporters.cann.test_recurrent_nodes import Streaming


def test_a_model_that_is_prepared_already_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    prepare(model)
    record = [LayerRecord("0", 0.1, 0, (0.1, 0.1))]
    with pytest.raises(
        ValueError, match=r"'0' is quantized already; apply_record takes a float model"
    ):
        apply_record(model, record, torch.zeros(1, 3))
    # The remedy works.
    apply_record(nn.Sequential(nn.Linear(3, 2)), record, torch.zeros(1, 3))


def test_an_lstm_s_scales_go_to_torch_s_gates_from_those_of_onnx() -> None:
    net = nn.Sequential(nn.LSTM(3, 2))
    entry = LayerRecord("0", 0.25, -3, (0.1, 0.2, 0.3, 0.4), scale_h=0.125, offset_h=5)
    # Per row: input, output, forget, cell in a record; input, forget, cell, output in torch.
    entry = replace(entry, scale_r=(0.1, 0.11, 0.2, 0.21, 0.3, 0.31, 0.4, 0.41))
    apply_record(net, [entry], torch.randn(4, 1, 3))
    model = convert(net.eval(), torch.randn(4, 1, 3))
    x, h = model.tensors["0.input"].qparams, model.tensors["0.hidden_l0"].qparams
    assert (float(x.scale), int(x.zero_point)) == (0.25, -3)
    assert (float(h.scale), int(h.zero_point)) == (0.125, 5)
    per_gate = model.tensors["0.weight_ih_l0"].qparams.scale
    torch.testing.assert_close(per_gate, torch.tensor([0.1, 0.1, 0.3, 0.3, 0.4, 0.4, 0.2, 0.2]))
    per_row = model.tensors["0.weight_hh_l0"].qparams.scale
    expected = torch.tensor([0.1, 0.11, 0.3, 0.31, 0.4, 0.41, 0.2, 0.21])
    torch.testing.assert_close(per_row, expected)


@pytest.mark.parametrize("name", ["lstm", "lstm_pt", "gru"])
def test_amct_s_record_of_a_recurrent_layer_gives_amct_s_record(name: str, tmp_path: Path) -> None:
    case = load_case(name)
    net = Streaming((nn.LSTM if name.startswith("lstm") else nn.GRU)(8, 16)).eval()
    inputs = tuple(map(torch.from_numpy, case.inputs.values()))
    apply_record(net, [case.records["rnn"]], inputs)
    exporter = CannExporter(rnn="device")
    with pytest.warns(UserWarning, match="best effort"):
        artifact = exporter.export(convert(net, inputs, dynamic_batch=False), tmp_path / "net")
    (entry,) = parse_record(artifact.files["record"].read_text())
    assert (entry.scale_d, entry.offset_d) == (case.records["rnn"].scale_d, 0)
    assert (entry.scale_h, entry.offset_h) == (case.records["rnn"].scale_h, 0)
    for own, theirs in (
        (entry.scale_w, case.records["rnn"].scale_w),
        (entry.scale_r, case.records["rnn"].scale_r),
    ):
        # One number for all may be written once per gate.
        assert set(own) == set(theirs)
        assert len(own) != len(theirs) or own == theirs


@pytest.mark.parametrize(
    ("layer", "entry", "message"),
    [
        (nn.LSTM(3, 2, num_layers=2), {}, "one layer of one direction.*num_layers 2"),
        (nn.GRU(3, 2, bidirectional=True), {}, "bidirectional True"),
        (
            nn.LSTM(3, 2),
            {"scale_h": None},
            "an LSTM or GRU must have scale_h, offset_h and scale_r",
        ),
        (
            nn.LSTM(3, 2),
            {"scale_h": None, "offset_h": None, "scale_r": ()},
            "must have scale_h and scale_r if it is an LSTM.*it is a LSTM and has scale_h None",
        ),
        (nn.Linear(3, 2), {}, "'0' must have .* no other layer has them; it is a Linear"),
        (nn.GRU(3, 2), {"scale_w": (0.1,) * 5}, r"one per gate \(3\) or one per row \(6\).*has 5"),
        (nn.GRU(3, 2), {"scale_r": (0.1,) * 4}, r"'0': scale_r must have one number"),
    ],
)
def test_records_that_do_not_fit_a_recurrent_layer_are_refused(
    layer: nn.Module, entry: dict[str, Any], message: str
) -> None:
    good = LayerRecord("0", 0.1, 0, (0.1,), scale_h=0.1, offset_h=0, scale_r=(0.1,))
    with pytest.raises(ValueError, match=message):
        apply_record(nn.Sequential(layer), [replace(good, **entry)], torch.zeros(4, 1, 3))
