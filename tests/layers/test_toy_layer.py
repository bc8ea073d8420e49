"""A QAT layer for somebody's own float layer: one class and one row, as CONTRIBUTING says."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_qat import convert, export, prepare, verify
from lightning_qat.layers._layer import QATLayer
from lightning_qat.layers.table import CHANNEL_AXES, LAYERS, WITH_WEIGHTS, Row
from lightning_qat.prepare import swap
from tests.models import shake_batchnorms


class Projection(nn.Module):
    """A user's own linear layer, without a bias."""

    weight: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class ProjectionQAT(Projection, QATLayer):
    """``Projection`` with fake-quantized input and weight."""

    float_class = Projection

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight_quantizer(self.weight)
        return functional.linear(self.input_quantizer(x), weight)


ROW = Row(ProjectionQAT, (torch.ops.aten.linear.default,))


@pytest.fixture(autouse=True)
def in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a row of ``TABLE`` gives, for these tests only."""
    monkeypatch.setitem(LAYERS, ROW.layer.float_class, ROW.layer)
    with_weights = (*WITH_WEIGHTS, ROW.layer.float_class)
    monkeypatch.setattr(swap, "WITH_WEIGHTS", with_weights)
    for operator in ROW.operators:
        monkeypatch.setitem(CHANNEL_AXES, operator, ROW.layer.channel_axis)


def network() -> nn.Sequential:
    return nn.Sequential(Projection(6, 5), nn.BatchNorm1d(5), nn.ReLU(), Projection(5, 3))


def test_the_layer_is_swapped_and_float_weights_load_into_it_and_back() -> None:
    float_net, net = network(), network()
    report = prepare(net, "int8", example_inputs=torch.randn(4, 6))
    assert [type(layer) for layer in net][::3] == [ProjectionQAT, ProjectionQAT]
    assert len(report.swapped) == 2
    missing, unexpected = net.load_state_dict(float_net.state_dict(), strict=False)
    assert unexpected == []
    assert not any(name.endswith(".weight") for name in missing)
    layer = net[3]
    assert isinstance(layer, ProjectionQAT)
    back = layer.to_float()
    assert type(back) is Projection
    assert back.weight is layer.weight


def test_its_output_is_the_written_out_reference() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Projection(6, 3)), torch.randn(16, 6)
    prepare(net, {"outputs": False}, example_inputs=x)
    with torch.no_grad():
        net.train()(x)
        found = net.eval()(x)
    layer = net[0]
    assert isinstance(layer, ProjectionQAT)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / 255
    zero_point = round(-128 - low / scale)
    integers = (x / scale).round().add(zero_point).clamp(-128, 127)
    weight_scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    weights = (layer.weight.detach() / weight_scale).round().clamp(-127, 127)
    expected = ((integers - zero_point) * scale) @ (weights * weight_scale).T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_it_converts_folds_batch_norm_and_exports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = network(), torch.randn(16, 6)
    prepare(net, "int8", example_inputs=x)
    shake_batchnorms(net)
    with torch.no_grad():
        for _ in range(2):
            net.train()(x)
    model = convert(net.eval(), x)
    assert [layer.name for layer in model.layers] == ["0", "3"]
    assert not any("batch_norm" in str(node.target) for node in model.program.graph.nodes)
    for target in ("fake_quant_onnx", "cann"):
        agreement = verify(model, export(model, target, tmp_path / target))
        assert agreement.parameters_equal, agreement
        assert agreement.max_steps <= 1.0
