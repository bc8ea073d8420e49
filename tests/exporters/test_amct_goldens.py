"""From a torch network to deploy files equal to those that AMCT wrote for it.

Activation scales come from AMCT's record, weights and batch norms from its trained state; integers,
folded scales, biases and dequant parameters are ours, by the ``amct`` recipe.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_qat import convert, export, prepare, verify
from lightning_qat.layers import QATLayer
from lightning_qat.qparams import Grid, QParams
from lightning_qat.quantizers import FinalActivation
from lightning_qat.recipe import PRESETS, Recipe
from lightning_qat.record import parse_record
from lightning_qat_exporters import CannExporter
from lightning_qat_exporters._ascend_executor import AscendExecutor
from tests.exporters.amct_goldens import Case, load_case, quantized_layers, quantized_order


class ConvNet(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.fc(x.flatten(1))


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Conv2d(4, 8, 1)
        self.r = nn.ReLU()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 1)
        self.mp = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.r(self.s(x))
        return self.a(x) + self.b(x) + self.mp(x)


class Lin3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(16, 32)
        self.l2 = nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.l2(torch.tanh(self.l1(x)))


AMCT = PRESETS["amct"]
PER_TENSOR = Recipe.from_dict({"preset": "amct", "weight": {"granularity": "per_tensor"}})
CASES = {
    "conv_arq_cw": (ConvNet, AMCT),
    "conv_arq_pt": (ConvNet, PER_TENSOR),
    "conv_dw": (lambda: ConvNet(groups=8), AMCT),
    "branch": (Branch, AMCT),
    "lin3d": (Lin3d, AMCT),
}


def golden_network(case: Case) -> nn.Module:
    """The network as AMCT trained it, with AMCT's activation scales."""
    build, recipe = CASES[case.name]
    net = build().eval()
    prepare(net, recipe)
    for name, layer in net.named_modules():
        if not isinstance(layer, QATLayer):
            continue
        state = {k: torch.from_numpy(np.array(v)) for k, v in case.state_of(name).items()}
        layer.weight.data = state["weight"]
        if "bias" in state:
            layer.bias.data = state["bias"]  # type: ignore[union-attr]
        if "bn.gamma" in state:
            bn = net.bn1
            assert isinstance(bn, nn.BatchNorm2d)
            bn.weight.data, bn.bias.data = state["bn.gamma"], state["bn.beta"]
            bn.running_mean, bn.running_var = state["bn.mean"], state["bn.var"]
        record = case.records[name]
        qparams = QParams(
            torch.tensor(record.scale_d),
            torch.tensor(record.offset_d, dtype=torch.int32),
            Grid(-128, 127),
        )
        layer.input_quantizer = FinalActivation(qparams, f"{name}.input")
    return net


@pytest.mark.parametrize("name", CASES)
def test_the_deploy_file_equals_amcts_around_every_quantized_layer(
    tmp_path: Path, name: str
) -> None:
    case = load_case(name)
    (x,) = case.inputs.values()
    model = convert(golden_network(case), torch.from_numpy(x))
    artifact = export(model, "cann", tmp_path / "net")
    ours = onnx.load(artifact.files["model"])
    assert quantized_order(ours) == quantized_order(case.deploy)
    for mine, theirs in zip(quantized_layers(ours), quantized_layers(case.deploy), strict=True):
        assert mine == theirs
    assert parse_record(artifact.files["record"].read_text()) == tuple(case.records.values())


@pytest.mark.parametrize("name", CASES)
def test_our_files_compute_what_amcts_simulation_computed(tmp_path: Path, name: str) -> None:
    case = load_case(name)
    (x,) = case.inputs.values()
    model = convert(golden_network(case), torch.from_numpy(x))
    exporter = CannExporter()
    artifact = exporter.export(model, tmp_path / "net")
    (wanted,) = case.outputs
    # AMCT's own file and ours in the executor: the same integers and scales, the same floats.
    executor = AscendExecutor(case.deploy_path)
    (theirs,) = executor.run(case.inputs)
    for runtime in exporter.runtimes:
        ours = exporter.run(artifact, runtime, {"x": x})["output"]
        np.testing.assert_array_equal(ours, theirs)
        # Summation order of float32 Adds.
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-6)
    agreement = verify(model, artifact)
    assert agreement.parameters_equal


def test_the_comparison_sees_a_single_changed_integer(tmp_path: Path) -> None:
    case = load_case("conv_arq_cw")
    (x,) = case.inputs.values()
    net = golden_network(case)
    with torch.no_grad():
        net.conv1.weight[0, 0, 0, 0] += 0.002  # type: ignore[index, operator]
    artifact = export(convert(net, torch.from_numpy(x)), "cann", tmp_path / "net")
    ours = quantized_layers(onnx.load(artifact.files["model"]))
    assert ours[0] != quantized_layers(case.deploy)[0]
    assert ours[1:] == quantized_layers(case.deploy)[1:]
