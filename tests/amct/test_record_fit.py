"""The factors of a record come out of the converted model to the bit, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.amct.apply_record import apply_record
from lightning_qat.amct.layer_record import LayerRecord
from lightning_qat.convert.convert import convert


def normalized(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 16, 1), nn.BatchNorm2d(16, **options), nn.ReLU()).eval()
    norm: Any = net[1]
    norm.running_var.fill_(1.9**-2)
    if options.get("affine", True):
        nn.init.uniform_(norm.weight, 1.0, 1.05)
        norm.weight.data[::2] *= -1
    return net


def float32(values: Tensor) -> tuple[float, ...]:
    return tuple(values.float().tolist())


IMAGE = torch.randn(1, 2, 4, 4)
# Times 1.9, products of float32 numbers skip about every other one of these.
ANY = float32(torch.linspace(1.9, 1.99, 16) / 16)


@pytest.mark.parametrize("scales", [ANY, (0.1234567,)], ids=["per channel", "one for all"])
@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=["gamma", "no gamma"])
def test_scales_in_front_of_batch_norm_are_reached_to_the_bit(
    scales: tuple[float, ...], options: dict[str, Any]
) -> None:
    net, before = normalized(**options), normalized(**options)
    apply_record(net, [LayerRecord("0", 0.1, 3, scales)], IMAGE)
    found = convert(net, IMAGE).tensors["0.weight"].qparams.scale
    assert torch.equal(found, torch.tensor(scales).expand(16))
    moved, variance = (net.get_buffer("1.running_var"), before.get_buffer("1.running_var"))
    torch.testing.assert_close(moved, variance, rtol=1e-6, atol=0)
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, net.get_parameter(name)), name


def test_a_channel_that_gamma_switches_off_has_the_record_s_scale_too() -> None:
    net = normalized()
    with torch.no_grad():
        net.get_parameter("1.weight")[3] = 0.0
    apply_record(net, [LayerRecord("0", 0.1, 3, ANY)], IMAGE)
    assert torch.equal(convert(net, IMAGE).tensors["0.weight"].qparams.scale, torch.tensor(ANY))


class Written(nn.Module):
    """Batch norm by a function, which no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 16, 1)
        self.var = nn.Parameter(normalized().get_buffer("1.running_var"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), torch.zeros(16), self.var)


@pytest.mark.parametrize("scales", [ANY, (0.1234567,)], ids=["per channel", "one for all"])
def test_what_cannot_be_reached_is_named_with_layer_and_channel(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"layer 'conv': scale_w is not reached in \d+ of 16") as e:
        apply_record(Written().eval(), [LayerRecord("conv", 0.1, 3, scales)], IMAGE)
    assert "torch.nn.utils.fusion.fuse_conv_bn_eval" in str(e.value)


def test_the_remedy_works() -> None:
    net = normalized()
    fused = nn.Sequential(torch.nn.utils.fusion.fuse_conv_bn_eval(net[0], net[1]), nn.ReLU())  # type: ignore[arg-type]
    apply_record(fused, [LayerRecord("0", 0.1, 3, ANY)], IMAGE)
    assert torch.equal(convert(fused, IMAGE).tensors["0.weight"].qparams.scale, torch.tensor(ANY))


@pytest.mark.parametrize("scale", [1.1754944e-38, 1e-30, 0.1, 1e30])
@pytest.mark.parametrize(
    ("kind", "offset"),
    [("INT8", -128), ("INT8", -1), ("INT8", 127), ("INT4", 7), ("INT16", 0)],
)
def test_scales_and_offsets_of_inputs_are_the_record_s(
    scale: float, kind: str, offset: int
) -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    apply_record(net, [LayerRecord("0", scale, offset, (scale,), act_type=kind)], torch.ones(1, 3))
    model = convert(net, torch.ones(1, 3))
    found = model.tensors["0.input"].qparams
    assert torch.equal(found.scale, torch.tensor(scale))
    assert int(found.zero_point) == offset
    assert torch.equal(model.tensors["0.weight"].qparams.scale, torch.tensor(scale))


@pytest.mark.parametrize(("scale_w", "scale_r"), [(1, 8), (8, 1), (4, 1), (1, 4)])
def test_both_weights_of_an_lstm_have_their_own_scales(scale_w: int, scale_r: int) -> None:
    net = nn.Sequential(nn.LSTM(3, 2))
    numbers = float32(torch.arange(1, 9) / 10)
    entry = LayerRecord(
        *("0", 0.25, -3, numbers[:scale_w]), scale_h=0.5, offset_h=1, scale_r=numbers[:scale_r]
    )
    apply_record(net, [entry], torch.ones(4, 1, 3))
    model = convert(net.eval(), torch.ones(4, 1, 3))
    for name, count in (("weight_ih_l0", scale_w), ("weight_hh_l0", scale_r)):
        scale = model.tensors[f"0.{name}"].qparams.scale
        assert set(scale.tolist()) == set(numbers[:count])


class Twice(nn.Module):
    """A layer under two names, one that never runs, and one inside of another."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.same = self.fc
        self.spare = nn.Linear(3, 3)
        self.table = nn.Embedding(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out


def test_a_layer_that_never_runs_has_its_factors_too() -> None:
    net = Twice()
    record = [LayerRecord("same", 0.5, 1, (0.25,)), LayerRecord("spare", 0.5, 1, (0.125,))]
    apply_record(net, record, torch.ones(1, 3))
    assert net.get_parameter("spare.weight_quantizer.half_width").tolist() == 0.125 * 128
    assert float(convert(net, torch.ones(1, 3)).tensors["fc.weight"].qparams.scale) == 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset_d": 300}, r"layer 'fc': offset_d must be in -128\.\.127"),
        ({"scale_d": 1e-40}, "layer 'fc': scale_d must be positive and finite"),
        ({"scale_w": ()}, "layer 'fc': scale_w must have one number at least"),
        ({"scale_w": (0.1,) * 6}, r"'fc': scale_w must have one number or one .*\(3\); it has 6"),
        ({"act_type": "INT16", "offset_d": 5}, "'fc' must have offset 0: activations of 16 bits"),
        ({"name": "table"}, "'table' must be one that can be quantized; Embedding"),
        ({"name": "type:Linear"}, "'type:Linear' must be a module of the model"),
        ({"name": "*"}, r"'\*' must be a module of the model"),
        ({"name": ""}, "'' must have a weight; Twice has none"),
    ],
)
def test_a_record_that_does_not_fit_leaves_the_model_as_it_was(
    changes: dict[str, Any], message: str
) -> None:
    net = Twice()
    bad = LayerRecord(**{"name": "fc", "scale_d": 0.5, "offset_d": 1, "scale_w": (0.1,), **changes})
    with pytest.raises(ValueError, match=message):
        apply_record(net, [LayerRecord("spare", 0.5, 1, (0.1,)), bad], torch.ones(1, 3))
    assert {type(module) for module in net.modules()} == {Twice, nn.Linear, nn.Embedding}


def test_a_layer_under_two_names_has_one_entry() -> None:
    record = [LayerRecord("fc", 0.5, 1, (0.1,)), LayerRecord("same", 0.5, 1, (0.2,))]
    with pytest.raises(ValueError, match="layer 'same' is the layer 'fc' under another name"):
        apply_record(Twice(), record, torch.ones(1, 3))


def test_layers_that_share_a_weight_and_its_quantizer_cannot_have_two_scales() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    record = [LayerRecord("0", 0.5, 1, (0.1,)), LayerRecord("1", 0.5, 1, (0.2,))]
    with pytest.raises(ValueError, match="layer '0': scale_w is not reached"):
        apply_record(net, record, torch.ones(1, 3))
