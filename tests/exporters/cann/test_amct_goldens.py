"""From a torch network to deploy files equal to those that AMCT wrote for it.

Activation scales come from AMCT's record, weights and batch norms from its trained state; integers,
folded scales, biases and dequant parameters are ours, by the recipe
that AMCT's own configuration of the network makes.
"""

import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat import QuantizedModel, convert, export, prepare, verify
from lightning_qat.amct.record import parse_record
from lightning_qat.export.protocol import Artifact
from lightning_qat.layers import QATLayer
from lightning_qat.numerics.qparams import IntegerGrid, QParams
from lightning_qat.quantizers.final import FinalActivation
from lightning_qat.quantizers.learned_weight import LearnedWeightQuantizer
from lightning_qat_exporters import CannExporter
from lightning_qat_exporters.cann import AscendExecutor
from tests.exporters.cann.amct_goldens import Case, load_case, quantized_layers, quantized_order

# One worker converts and writes each network once.
pytestmark = pytest.mark.xdist_group("AMCT's networks")


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


class Deconv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.deconv = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.fc = nn.Linear(1536, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.deconv(x).flatten(1))


class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv1d(4, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm1d(8)
        self.d = nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.relu(self.bn1(self.c(x))))


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


CASES = {
    "conv_arq_cw": ConvNet,
    "conv_arq_pt": ConvNet,
    "conv_ulq_cw": ConvNet,
    "conv_dw": lambda: ConvNet(groups=8),
    "conv_deconv": Deconv,
    "conv_a8w4": ConvNet,
    "conv_a16w8": ConvNet,
    "conv1d": Conv1d,
    "branch": Branch,
    "lin3d": Lin3d,
}


def golden_network(case: Case) -> nn.Module:
    """The network as AMCT trained it, with AMCT's activation scales."""
    net = CASES[case.name]().eval()
    prepare(net, case.deploy_path.with_name("config.json"))
    for name, layer in net.named_modules():
        if not isinstance(layer, QATLayer):
            continue
        state = {k: torch.from_numpy(np.array(v)) for k, v in case.tensor_state(name).items()}
        layer.weight.data = state["weight"]
        if "bias" in state:
            layer.bias.data = state["bias"]  # type: ignore[union-attr]
        if "bn.gamma" in state:
            bn = net.bn1
            assert isinstance(bn, _BatchNorm)
            bn.weight.data, bn.bias.data = state["bn.gamma"], state["bn.beta"]
            bn.running_mean, bn.running_var = state["bn.mean"], state["bn.var"]
        if isinstance(layer.weight_quantizer, LearnedWeightQuantizer):
            shape = layer.weight_quantizer.half_width.shape
            layer.weight_quantizer.start_from_step(state["wts_scales"].reshape(shape))
        record = case.records[name]
        qparams = QParams(
            torch.tensor(record.scale_d),
            torch.tensor(record.offset_d, dtype=torch.int32),
            IntegerGrid.signed(16 if record.act_type == "INT16" else 8),
        )
        layer.input_quantizer = FinalActivation(qparams, f"{name}.input")
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("amct")


@functools.cache
def written(name: str, folder: Path) -> tuple[QuantizedModel, Artifact]:
    """One of AMCT's networks as we convert and write it."""
    case = load_case(name)
    (x,) = case.inputs.values()
    model = convert(golden_network(case), torch.from_numpy(x))
    return model, export(model, CannExporter(int4_weights=True), folder / name)


@pytest.mark.parametrize("name", CASES)
def test_the_deploy_file_equals_amcts_around_every_quantized_layer(folder: Path, name: str) -> None:
    case = load_case(name)
    _, artifact = written(name, folder)
    ours = onnx.load(artifact.files["model"])
    assert quantized_order(ours) == quantized_order(case.deploy)
    for mine, theirs in zip(quantized_layers(ours), quantized_layers(case.deploy), strict=True):
        assert mine == theirs
    assert parse_record(artifact.files["record"].read_text()) == tuple(case.records.values())


@pytest.mark.parametrize("name", CASES)
def test_our_files_compute_what_amcts_simulation_computed(folder: Path, name: str) -> None:
    case = load_case(name)
    (x,) = case.inputs.values()
    exporter = CannExporter(int4_weights=True)
    model, artifact = written(name, folder)
    (wanted,) = case.outputs
    # AMCT's own file and ours in the executor: the same integers and scales, the same floats.
    executor = AscendExecutor(case.deploy_path)
    (theirs,) = executor.run(case.inputs)
    for runtime in exporter.runtimes:
        ours = exporter.run(artifact, runtime, {"x": x})["output"]
        np.testing.assert_array_equal(ours, theirs)
        # Summation order of float32 Adds.
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-6)
    agreement = verify(model, artifact, exporter=exporter)
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
