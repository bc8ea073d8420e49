"""AMCT's single-operator mode: its two code samples, from QAT layers to deploy files.

What ``train``, ``data`` and pretrained weights stand for is small and generated; layers,
configurations and calls are those of AMCT's guide.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import lightning_qat
from lightning_qat.layers import Conv2dQAT, LinearQAT
from lightning_qat_exporters.cann import AscendExecutor
from lightning_qat_exporters.cann.deploy import to_deploy
from lightning_qat_exporters.cann.normalize.normalize import with_plain_constants
from lightning_qat_exporters.cann.qdq_graph.match import find_quantized
from lightning_qat_exporters.cann.qdq_graph.types import QuantizedGraph


def matched(path: Path) -> QuantizedGraph:
    return find_quantized(with_plain_constants(ir.load(path)))


def config(*, channel_wise: bool) -> dict[str, Any]:
    return {
        "retrain_data_config": {
            "dst_type": "INT8",
            "batch_num": 10,
            "fixed_min": False,
            "clip_min": None,
            "clip_max": None,
        },
        "retrain_weight_config": {
            "dst_type": "INT8",
            "weights_retrain_algo": "arq_retrain",
            "channel_wise": channel_wise,
        },
    }


def train(net: nn.Module, data: Tensor) -> None:
    torch.manual_seed(0)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(12):
        optimizer.zero_grad()
        net(data + 0.1 * torch.randn_like(data)).square().mean().backward()
        optimizer.step()
    net.eval()


def lenet(config: dict[str, Any]) -> nn.Module:
    return torch.nn.Sequential(
        Conv2dQAT(1, 6, kernel_size=5, padding=2, config=config),
        nn.Sigmoid(),
        nn.AvgPool2d(kernel_size=2, stride=2),
        Conv2dQAT(6, 16, kernel_size=5, config=config),
        nn.Sigmoid(),
        nn.AvgPool2d(kernel_size=2, stride=2),
        nn.Flatten(),
        LinearQAT(16 * 5 * 5, 120, config=config),
        nn.Sigmoid(),
        LinearQAT(120, 84, config=config),
        nn.Sigmoid(),
        LinearQAT(84, 10, config=config),
    )


class Residual(nn.Module):
    """A small network with batch norms, nested names and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.block(x)).mean((2, 3)))


def fine_tuned(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    def _set_module(model: nn.Module, submodule_key: str, module: nn.Module) -> None:
        tokens = submodule_key.split(".")
        sub_tokens = tokens[:-1]
        cur_mod = model
        for s in sub_tokens:
            cur_mod = getattr(cur_mod, s)
        setattr(cur_mod, tokens[-1], module)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            qat_module = Conv2dQAT.from_float(module, config=config)
            _set_module(model, name, qat_module)
    return model


SAMPLES = {
    "from scratch": (lambda: lenet(config(channel_wise=False)), (1, 1, 28, 28), 5),
    "fine-tuning": (lambda: fine_tuned(Residual(), config(channel_wise=True)), (2, 3, 8, 8), 2),
}


def sample(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape, _ = SAMPLES[name]
    model, data = build(), torch.randn(shape)
    train(model, data)
    return model, data


def run(path: str | Path, data: Tensor) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options)
    return session.run(None, {session.get_inputs()[0].name: data.numpy()})[0]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_the_intermediate_model_has_every_layer_between_quantize_and_dequantize(
    tmp_path: Path, name: str
) -> None:
    model, data = sample(name)
    before = copy.deepcopy(model.state_dict())
    torch.onnx.export(model, (data,), tmp_path / "inter_model.onnx", verbose=False)
    onnx.checker.check_model(str(tmp_path / "inter_model.onnx"), full_check=True)
    with torch.no_grad():
        live = model(data).numpy()
    np.testing.assert_allclose(
        run(tmp_path / "inter_model.onnx", data), live, rtol=0, atol=2e-3 * np.ptp(live)
    )
    deploy = to_deploy(matched(tmp_path / "inter_model.onnx"))
    names = [node.op_type for node in deploy.graph]
    assert names.count("AscendDequant") == SAMPLES[name][2]
    executor = AscendExecutor(deploy)
    (deployed,) = executor.run({executor.input_names[0]: data.numpy()})
    np.testing.assert_allclose(deployed, live, rtol=0, atol=2e-3 * np.ptp(live))
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if isinstance(v, Tensor))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_the_samples_end_in_deploy_and_fake_quant_models(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_qat_model = getattr(lightning_qat, "convert_qat_model", None)
    if convert_qat_model is None:
        pytest.skip("this version has no convert_qat_model")
    monkeypatch.chdir(tmp_path)
    model, data = sample(name)
    torch.onnx.export(model, (data,), "inter_model.onnx")
    convert_qat_model("inter_model.onnx", "./outputs/lenet")
    with torch.no_grad():
        live = model(data).numpy()
    simulated = run("./outputs/lenet_fake_quant_model.onnx", data)
    np.testing.assert_allclose(simulated, live, rtol=0, atol=2e-3 * np.ptp(live))
    executor = AscendExecutor("./outputs/lenet_deploy_model.onnx")
    (deployed,) = executor.run({executor.input_names[0]: data.numpy()})
    np.testing.assert_allclose(deployed, simulated, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize(
    ("weight", "features"),
    [
        ({"weights_retrain_algo": "arq_retrain", "dst_type": "INT8"}, 2048),
        ({"weights_retrain_algo": "arq_retrain", "dst_type": "INT4"}, 2048),
        ({"weights_retrain_algo": "ulq_retrain", "dst_type": "INT8"}, 2048),
    ],
)
def test_the_intermediate_model_holds_the_very_numbers_of_convert(
    tmp_path: Path, weight: dict[str, str], features: int
) -> None:
    # Large enough that torch.onnx leaves the computation of the scale in the graph.
    torch.manual_seed(0)
    layer = LinearQAT(features, 64, config={"retrain_weight_config": weight})
    net, x = nn.Sequential(layer), torch.randn(4, features)
    net(x).sum().backward()
    net.eval()
    torch.onnx.export(net, (x,), tmp_path / "inter.onnx", verbose=False)
    final = layer.weight_quantizer.qparams(layer.weight)  # type: ignore[union-attr, operator]
    data = layer.input_quantizer.qparams()  # type: ignore[union-attr, operator]
    deploy = to_deploy(matched(tmp_path / "inter.onnx"))
    (param,) = (v for n, v in deploy.graph.initializers.items() if n.endswith("dequant.param"))
    assert param.const_value is not None
    product = (data.scale * final.scale).reshape(1).numpy()
    assert param.const_value.numpy().tolist() == product.view(np.uint32).tolist()
    (stored,) = (v for n, v in deploy.graph.initializers.items() if n.endswith(".weight"))
    assert stored.const_value is not None
    integers = torch.clamp(
        torch.round(layer.weight / final.scale), final.grid.qmin, final.grid.qmax
    )
    np.testing.assert_array_equal(stored.const_value.numpy(), integers.detach().T.numpy())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode")
def test_an_export_in_training_mode_observes_nothing(tmp_path: Path) -> None:
    net, x = nn.Sequential(LinearQAT(4, 2)), torch.randn(3, 4)
    net(x)
    quantizer: Any = net[0].input_quantizer
    before = quantizer.min_val.clone(), float(quantizer.batches)
    torch.onnx.export(net.train(), (10 * x,), tmp_path / "inter.onnx", verbose=False)
    assert (quantizer.min_val, float(quantizer.batches)) == before
    found = matched(tmp_path / "inter.onnx")
    assert len(found.activations) == 1
