"""Grouped transposed convolutions: a scale per output channel, from training to every file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from lightning_qat import convert, convert_qat_model, export, prepare, verify
from lightning_qat.layers import ConvTranspose1dQAT, ConvTranspose2dQAT
from lightning_qat.numerics.arithmetic import along_channels, channels_first, channels_second
from lightning_qat.training.weights_once import weights_quantized_once
from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter, TFLiteExporter
from tests.models import INPUTS_ONLY, shake_batchnorms

SHAPES = [(2, 4, 8), (4, 4, 4), (4, 4, 8), (4, 8, 4), (3, 6, 6)]
"""Groups, input and output channels: several of both in a group, depthwise with one and two, many
to one, and a weight whose shape is the same with both axes exchanged."""

WEIGHTS: list[dict[str, Any]] = [
    {"quantizer": name, "bits": bits}
    for name, bits in (("minmax", 8), ("minmax", 4), ("arq", 8), ("learned", 8), ("ulq", 4))
]


def spread(layer: nn.Module) -> nn.Module:
    """Weights of very different sizes from output channel to output channel."""
    groups: Any = layer.groups
    with torch.no_grad():
        weight: Any = layer.weight
        rows = channels_first(weight, groups)
        sizes = torch.logspace(-2, 1, len(rows)).reshape(-1, *[1] * (rows.dim() - 1))
        weight.copy_(channels_second(rows * sizes, groups))
    return layer


def of_each_group(layer: nn.Module, config: Any) -> list[ConvTranspose2dQAT]:
    """The independent reference: a layer of one group for every group."""
    assert isinstance(layer, nn.ConvTranspose2d)
    made = []
    rows = layer.in_channels // layer.groups
    columns = layer.out_channels // layer.groups
    for group in range(layer.groups):
        one = ConvTranspose2dQAT(rows, columns, 3, stride=2, bias=False, config=config)
        with torch.no_grad():
            one.weight.copy_(layer.weight[group * rows : (group + 1) * rows])
        made.append(one)
    return made


def test_every_output_channel_has_its_scale() -> None:
    layer = ConvTranspose1dQAT(2, 4, 1, groups=2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(127 * torch.tensor([[[1.0], [2.0]], [[3.0], [-4.0]]]))
    quantizer: Any = layer.weight_quantizer
    assert quantizer.qparams(layer.weight).scale.tolist() == [1.0, 2.0, 3.0, 4.0]
    depthwise = ConvTranspose1dQAT(3, 3, 2, groups=3)
    quantizer = depthwise.weight_quantizer
    assert quantizer.qparams(depthwise.weight).scale.shape == (3,)


def test_a_rearranged_weight_is_that_of_a_convolution() -> None:
    weight, y = torch.randn(6, 4, 3), torch.randn(2, 6, 5)
    rows = channels_first(weight, 3)
    assert rows.shape == (12, 2, 3)
    assert torch.equal(channels_second(rows, 3), weight)
    blocks = [
        nn.functional.conv_transpose1d(one, block.transpose(0, 1))
        for one, block in zip(y.chunk(3, 1), rows.chunk(3), strict=True)
    ]
    expected = nn.functional.conv_transpose1d(y, weight, groups=3)
    torch.testing.assert_close(torch.cat(blocks, 1), expected)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda w: f"{w['quantizer']}{w['bits']}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_trains_as_one_layer_for_each_group(
    shape: tuple[int, int, int], weight: dict[str, Any], compact: bool
) -> None:
    groups, inputs, outputs = shape
    config = {"weight": weight, "joins": False, "outputs": False}
    layer = ConvTranspose2dQAT(
        inputs, outputs, 3, stride=2, groups=groups, bias=False, config=config
    )
    spread(layer)
    parts = of_each_group(layer, config)
    for one in (layer, *parts):
        one.input_quantizer.quantizing = False  # type: ignore[union-attr]
        one.weight_quantizer.compact = compact  # type: ignore[union-attr]
    x = torch.randn(2, inputs, 4, 4)
    for _ in range(2):
        output = layer(x)
        pieces = [part(block) for part, block in zip(parts, x.chunk(groups, 1), strict=True)]
        torch.testing.assert_close(output, torch.cat(pieces, 1), rtol=1e-6, atol=1e-6)
        output.square().sum().backward()
        torch.cat(pieces, 1).square().sum().backward()
        grads = torch.cat([part.weight.grad for part in parts])  # type: ignore[misc]
        torch.testing.assert_close(layer.weight.grad, grads, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        layer.weight_quantizer(layer.weight),
        torch.cat([part.weight_quantizer(part.weight) for part in parts]),
    )


@pytest.mark.parametrize("name", ["minmax", "learned"])
def test_a_weight_that_is_kept_for_several_forwards_is_the_newest(name: str) -> None:
    config = {"weight": {"quantizer": name}, "joins": False, "outputs": False}
    layer = ConvTranspose2dQAT(4, 8, 3, groups=2, config=config)
    other, x = copy.deepcopy(layer), torch.randn(2, 4, 4, 4)
    for step in range(2):
        with weights_quantized_once(layer):
            layer(x)
            found = layer(x)
        torch.testing.assert_close(found, other(x), rtol=0, atol=0)
        found.sum().backward()
        with torch.no_grad():
            for one in (layer, other):
                one.weight[step] *= 3.0


class Net(nn.Module):
    """A grouped transposed convolution, a batch norm and a relu."""

    def __init__(self, shape: tuple[int, int, int], axes: int = 2) -> None:
        super().__init__()
        groups, inputs, outputs = shape
        layer, norm = (
            (nn.ConvTranspose1d, nn.BatchNorm1d),
            (nn.ConvTranspose2d, nn.BatchNorm2d),
            (nn.ConvTranspose3d, nn.BatchNorm3d),
        )[axes - 1]
        self.up = spread(layer(inputs, outputs, 3, stride=2, groups=groups))
        self.bn = norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.up(x)))


def trained(net: nn.Module, x: Tensor, recipe: Any = "int8") -> nn.Module:
    prepare(net, recipe, x)
    shake_batchnorms(net)
    net.train()
    with torch.no_grad():
        for _ in range(2):
            net(x)
    return net.eval()


@pytest.mark.parametrize(
    ("shape", "axes"), [*((shape, 2) for shape in SHAPES), ((3, 6, 6), 1), ((2, 4, 8), 3)], ids=str
)
def test_batch_norm_folds_and_files_for_onnx_and_ascend_are_exact(
    shape: tuple[int, int, int], axes: int, tmp_path: Path
) -> None:
    x = torch.randn(3, shape[1], *[4] * axes)
    net = trained(Net(shape, axes), x)
    quantized = convert(net, x)
    assert not any("norm" in str(node.target) for node in quantized.program.graph.nodes)
    assert quantized.tensors["up.weight"].qparams.scale.shape == (shape[2],)
    torch.testing.assert_close(quantized(x), net(x), rtol=0, atol=2 * one_step(quantized))
    for exporter in (FakeQuantOnnxExporter(), CannExporter()):
        agreement = verify(quantized, export(quantized, exporter, tmp_path / "net"))
        assert agreement.parameters_equal, str(agreement)
        assert agreement.max_steps is not None
        assert agreement.max_steps < 1.01


def test_a_deploy_file_has_amcts_scales_integers_and_biases(tmp_path: Path) -> None:
    """AMCT has out_channels / groups * groups scales, those of the first group first."""
    torch.manual_seed(0)
    groups, rows, columns = 2, 3, 4
    layer = nn.ConvTranspose2d(groups * rows, groups * columns, 3, groups=groups)
    net = nn.Sequential(spread(layer))
    x = torch.randn(2, groups * rows, 5, 5)
    assert layer.bias is not None
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    artifact = CannExporter().export(convert(trained(net, x), x), tmp_path / "net")
    graph = onnx.load(artifact.files["model"]).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    param = arrays["0.dequant.param"].astype(np.uint32).view(np.float32)
    (quant,) = (node for node in graph.node if node.name == "0.quant")
    scale_d = 1 / next(a.f for a in quant.attribute if a.name == "scale")
    assert arrays["0.weight"].shape == tuple(weight.shape)
    assert param.shape == arrays["0.bias"].shape == (groups * columns,)
    for group in range(groups):
        for column in range(columns):
            channel = group * columns + column
            of_channel = weight[group * rows : (group + 1) * rows, column].numpy()
            scale_w = param[channel] / scale_d
            np.testing.assert_allclose(scale_w, np.abs(of_channel).max() / 127, rtol=1e-5)
            integers = arrays["0.weight"][group * rows : (group + 1) * rows, column]
            np.testing.assert_array_equal(integers, np.rint(of_channel / scale_w))
            assert arrays["0.bias"][channel] == np.rint(bias[channel].numpy() / param[channel])


def one_step(quantized: Any) -> float:
    (step,) = quantized.output_steps.values()
    return float(step)


@pytest.mark.parametrize("shape", [(2, 4, 8), (3, 6, 6)], ids=str)
def test_files_for_litert_are_exact(shape: tuple[int, int, int], tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    x = torch.randn(3, shape[1], 4, 4)
    quantized = convert(trained(Net(shape), x), x)
    artifact = export(quantized, TFLiteExporter(backend="litert"), tmp_path / "net")
    agreement = verify(quantized, artifact)
    assert agreement.parameters_equal, str(agreement)
    assert agreement.max_steps is not None
    assert agreement.max_steps < 1.01
    assert not [note for note in artifact.notes if "computed in float" in note.lower()]


def test_the_error_of_every_channel_is_that_of_one_group() -> None:
    """Half a step of 127 in each weight, half a step of 255 in each input."""
    layer = spread(nn.ConvTranspose2d(4, 8, 3, groups=2, bias=False))
    net = nn.Sequential(copy.deepcopy(layer))
    x = torch.randn(8, 4, 6, 6)
    prepare(net, INPUTS_ONLY)
    net(x)
    with torch.no_grad():
        quantized, exact = net.eval()(x), layer(x)
    error = (quantized - exact).abs().amax((0, 2, 3)) / exact.abs().amax((0, 2, 3))
    assert float(error.max()) < 0.02


def test_a_learned_scale_of_an_earlier_version_serves_every_group() -> None:
    config = {"weight": {"quantizer": "learned"}}
    layer = ConvTranspose2dQAT(4, 8, 3, groups=2, config=config)
    layer(torch.randn(2, 4, 4, 4))
    state = layer.state_dict()
    assert state.pop("weight_quantizer.half_width").shape == (8,)
    state["weight_quantizer.scale"] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    layer.load_state_dict(state)
    quantizer: Any = layer.weight_quantizer
    scale = quantizer.step()
    assert scale.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4] * 2)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*half_width"):
        layer.load_state_dict({**state, "weight_quantizer.scale": torch.ones(3)})


def test_scales_of_a_converted_model_of_an_earlier_version_serve_every_group() -> None:
    scale = torch.tensor([1.0, 2.0])
    assert along_channels(scale, (4, 2, 3), 1).shape == (1, 2, 1)
    assert (
        along_channels(scale.repeat(2), (4, 2, 3), 1)
        .expand(4, 2, 1)
        .equal(scale.reshape(1, 2, 1).expand(4, 2, 1))
    )


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("shape", [(2, 4, 8), (4, 4, 4)], ids=str)
def test_torchs_own_export_converts_for_ascend(shape: tuple[int, int, int], tmp_path: Path) -> None:
    x = torch.randn(3, shape[1], 4, 4)
    net = nn.Sequential(spread(nn.ConvTranspose2d(shape[1], shape[2], 3, groups=shape[0])))
    trained(net, x, {"joins": False, "outputs": False})
    torch.onnx.export(net, (x,), tmp_path / "qat.onnx", verbose=False)
    onnx.checker.check_model(str(tmp_path / "qat.onnx"), full_check=True)
    done = convert_qat_model(tmp_path / "qat.onnx", tmp_path / "net")
    assert "1 layers on integers" in str(done)
    for file in ("qat.onnx", "net_fake_quant_model.onnx"):
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(str(tmp_path / file), options)
        found: Any = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        with torch.no_grad():
            live = net(x).numpy()
        np.testing.assert_allclose(found, live, rtol=0, atol=2e-3 * np.ptp(live))
