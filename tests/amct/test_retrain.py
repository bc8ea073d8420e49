"""AMCT's functions by their names: its two documented flows, and what each function promises."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import lightning_qat.amct as amct
from lightning_qat.amct.record import parse_record
from lightning_qat.convert.capture import CaptureError
from lightning_qat.layers import QATLayer
from lightning_qat_exporters.cann import AscendExecutor
from tests.exporters.cann.test_amct_goldens import CASES

GOLDENS = Path(__file__).parents[1] / "goldens" / "amct"
CONFIG, CFG, RECORD = "./tmp/config.json", "./retrain.cfg", "./tmp/record.txt"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(CFG).write_text("batch_num: 2\n", encoding="utf-8")
    torch.manual_seed(0)


class Network(nn.Module):
    """Small, with every form of layer that the documented flows quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(4 * 16 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(torch.relu(self.up(x)).flatten(1))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Blobs whose class is the row band that is bright."""
    data = []
    for _ in range(count):
        labels = torch.randint(0, 3, (16,))
        images = torch.randn(16, 1, 8, 8) * 0.3
        for image, label in zip(images, labels, strict=True):
            image[0, 2 * label : 2 * label + 3] += 1.0
        data.append((images, labels))
    return data


def train(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()
    for images, labels in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def infer(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    with torch.no_grad():
        hits = [model(images).argmax(1) == labels for images, labels in data]
    return float(torch.cat(hits).float().mean())


def infer_onnx(path: str, data: list[tuple[Tensor, Tensor]]) -> float:
    session = ort.InferenceSession(path)
    (name,) = (i.name for i in session.get_inputs())
    hits = [session.run(None, {name: x.numpy()})[0].argmax(1) == y.numpy() for x, y in data]
    return float(np.concatenate(hits).mean())


# The two flows of AMCT's guide; "user" parts are small, calls and arguments are the guide's


def test_the_documented_flow() -> None:
    train_data, test_data = batches(30), batches(4)
    ori_model, ori_model_input_data = Network(), (train_data[0][0],)
    train(ori_model, train_data)

    config_file = "./tmp/config.json"
    simple_cfg = "./retrain.cfg"
    amct.create_quant_retrain_config(
        config_file=config_file,
        model=ori_model,
        input_data=ori_model_input_data,
        config_defination=simple_cfg,
    )
    record_file = "./tmp/record.txt"
    quant_retrain_model = amct.create_quant_retrain_model(
        config_file=config_file,
        model=ori_model,
        record_file=record_file,
        input_data=ori_model_input_data,
    )
    train(quant_retrain_model, train_data)
    trained = infer(quant_retrain_model, test_data)
    quant_model_path = "./result/user_model"
    amct.save_quant_retrain_model(
        config_file=config_file,
        model=quant_retrain_model,
        record_file=record_file,
        save_path=quant_model_path,
        input_data=ori_model_input_data,
    )

    assert trained > 0.9
    assert infer_onnx("./result/user_model_fake_quant_model.onnx", test_data) == trained
    executor = AscendExecutor("./result/user_model_deploy_model.onnx")
    images, _ = test_data[0]
    (deployed,) = executor.run({executor.input_names[0]: images.numpy()})
    with torch.no_grad():
        live = quant_retrain_model(images).numpy()
    # Biases are integers in the files, so a value near half a step may fall the other way.
    np.testing.assert_allclose(deployed, live, rtol=0, atol=1e-3 * np.ptp(live))
    records = parse_record(Path(record_file).read_text())
    assert [record.name for record in records] == ["conv", "up", "fc"]
    assert sorted(p.name for p in Path("result").iterdir()) == [
        "user_model_deploy_model.onnx",
        "user_model_fake_quant_model.onnx",
    ]


def test_the_documented_flow_after_an_interruption() -> None:
    train_data, test_data = batches(30), batches(4)
    first, ori_model_input_data = Network(), (train_data[0][0],)
    config_file = "./tmp/config.json"
    record_file = "./tmp/record.txt"
    amct.create_quant_retrain_config(config_file, first, ori_model_input_data, "./retrain.cfg")
    first = amct.create_quant_retrain_model(config_file, first, record_file, ori_model_input_data)
    train(first, train_data[:20])
    Path("ckpt").mkdir()
    torch.save(first.state_dict(), "./ckpt/user_model_newest.ckpt")

    ori_model = Network()
    quant_pth_file = "./ckpt/user_model_newest.ckpt"
    quant_retrain_model = amct.restore_quant_retrain_model(
        config_file=config_file,
        model=ori_model,
        record_file=record_file,
        input_data=ori_model_input_data,
        pth_file=quant_pth_file,
    )
    for name, value in first.state_dict().items():
        restored = quant_retrain_model.state_dict()[name]
        assert torch.equal(restored, value) if isinstance(value, Tensor) else restored == value
    train(quant_retrain_model, train_data[20:])
    trained = infer(quant_retrain_model, test_data)
    quant_model_path = "./result/user_model"
    # The guide gives the original model here: it is the same object.
    amct.save_quant_retrain_model(
        config_file=config_file,
        model=ori_model,
        record_file=record_file,
        save_path=quant_model_path,
        input_data=ori_model_input_data,
    )
    assert infer_onnx("./result/user_model_fake_quant_model.onnx", test_data) == trained


# create_quant_retrain_config


@pytest.mark.parametrize("case", CASES)
def test_the_json_configuration_is_amcts_own(case: str) -> None:
    x = torch.from_numpy(np.load(GOLDENS / case / "io.npz")["in0"])
    net = CASES[case]()
    amct.create_quant_retrain_config(CONFIG, net, x, GOLDENS / case / "retrain.cfg")
    ours = json.loads(Path(CONFIG).read_text())
    theirs = json.loads((GOLDENS / case / "config.json").read_text())
    assert ours == theirs
    assert list(ours) == list(theirs)


def test_without_a_simple_configuration_every_layer_gets_amcts_defaults() -> None:
    net = Network()
    report = amct.create_quant_retrain_config(CONFIG, net, batches(1)[0][0])
    config = json.loads(Path(CONFIG).read_text())
    assert list(config) == ["version", "batch_num", "conv", "up", "fc"]
    assert config["batch_num"] == 1
    assert [config[n]["retrain_weight_config"]["channel_wise"] for n in ("conv", "up", "fc")] == [
        True,
        True,
        False,
    ]
    assert [layer.name for layer in report.swapped] == ["conv", "up", "fc"]
    assert not any(isinstance(m, QATLayer) for m in net.modules())


def test_clips_and_fixed_min_arrive_in_the_json_configuration() -> None:
    Path(CFG).write_text(
        """
        override_layer_configs { layer_name: "conv" retrain_data_quant_config { ulq_quantize {
          clip_max_min { clip_max: 2.5 clip_min: -1.5 } fixed_min: false } } }
        quant_skip_types: "ConvTranspose2d"
        """
    )
    report = amct.create_quant_retrain_config(CONFIG, Network(), batches(1)[0][0], CFG)
    config = json.loads(Path(CONFIG).read_text())
    assert config["conv"]["retrain_data_config"] == {
        "algo": "ulq_quantize",
        "dst_type": "INT8",
        "clip_max": 2.5,
        "clip_min": -1.5,
        "fixed_min": False,
    }
    assert "up" not in config
    assert [(s.name, s.reason) for s in report.skipped] == [
        ("up", "excluded by the recipe (exclude: 'type:ConvTranspose2d')")
    ]
    net = amct.create_quant_retrain_model(CONFIG, Network(), RECORD, batches(1)[0][0])
    assert net.conv.input_quantizer.spec.clip == (-1.5, 2.5)  # type: ignore[union-attr]


def test_a_linear_with_a_scale_per_channel_is_refused_by_name() -> None:
    Path(CFG).write_text(
        'override_layer_configs { layer_name: "fc" '
        "retrain_weight_quant_config { arq_retrain { channel_wise: true } } }"
    )
    with pytest.raises(ValueError, match="fc: channel_wise must be false for Linear"):
        amct.create_quant_retrain_config(CONFIG, Network(), batches(1)[0][0], CFG)
    assert not Path(CONFIG).exists()


def test_a_network_that_cannot_be_exported_is_found_out_before_training() -> None:
    class Branching(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.mean() > 0 else -x)

    net, x = Branching(), batches(1)[0][0]
    with pytest.raises(CaptureError):
        amct.create_quant_retrain_config(CONFIG, net, x)
    amct.create_quant_retrain_config(CONFIG, Network(), x)
    with pytest.raises(CaptureError):
        amct.create_quant_retrain_model(CONFIG, net, RECORD, x)
    assert not any(isinstance(m, QATLayer) for m in net.modules())


# create_quant_retrain_model


def test_the_model_itself_is_changed_and_only_where_the_configuration_says() -> None:
    net, x = Network(), batches(1)[0][0]
    amct.create_quant_retrain_config(CONFIG, net, x)
    config = json.loads(Path(CONFIG).read_text())
    config["up"]["retrain_enable"] = False
    Path(CONFIG).write_text(json.dumps(config))
    result = amct.create_quant_retrain_model(CONFIG, net, RECORD, x)
    assert result is net
    assert [n for n, m in net.named_modules() if isinstance(m, QATLayer)] == ["conv", "fc"]


def test_calibration_takes_batch_num_training_batches_and_no_more() -> None:
    net, data = Network(), batches(3)
    amct.create_quant_retrain_config(CONFIG, net, data[0][0], CFG)
    net = amct.create_quant_retrain_model(CONFIG, net, RECORD, data[0][0])
    quantizer: Any = net.conv.input_quantizer
    net.train()
    seen = []
    for scale, (images, _) in zip((1.0, 3.0, 50.0), data, strict=True):
        net(images * scale)
        seen.append((quantizer.calibrated, quantizer.clip_max.item()))
    assert [calibrated for calibrated, _ in seen] == [False, True, True]
    assert seen[0][1] < seen[1][1] == seen[2][1]


# restore_quant_retrain_model


def trained_model() -> tuple[nn.Module, Tensor]:
    net, data = Network(), batches(3)
    amct.create_quant_retrain_config(CONFIG, net, data[0][0], CFG)
    net = amct.create_quant_retrain_model(CONFIG, net, RECORD, data[0][0])
    train(net, data)
    return net, data[0][0]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_dict_may_lie_in_a_mapping_and_come_from_ddp(prefix: str) -> None:
    net, x = trained_model()
    state = {f"{prefix}{name}": value for name, value in net.state_dict().items()}
    torch.save({"epoch": 3, "model": state}, "last.pth")
    restored = amct.restore_quant_retrain_model(
        CONFIG, Network(), RECORD, x, "last.pth", state_dict_name="model"
    )
    torch.testing.assert_close(restored.eval()(x), net.eval()(x), rtol=0, atol=0)


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    net, x = trained_model()
    state = net.state_dict()

    def restored(name: str | None = None) -> nn.Module:
        return amct.restore_quant_retrain_model(CONFIG, Network(), RECORD, x, "a.pth", name)

    with pytest.raises(FileNotFoundError, match=r"There must be a checkpoint at 'a\.pth'"):
        restored()
    torch.save({"model": state}, "a.pth")
    with pytest.raises(ValueError, match=r"no quantizer is in it\. Give state_dict_name, one of"):
        restored()
    with pytest.raises(ValueError, match=r"under 'net'; it has the keys \['model'\]"):
        restored("net")
    torch.save(Network().state_dict(), "a.pth")
    with pytest.raises(ValueError, match="must hold the state_dict of a QAT model"):
        restored()
    torch.save({k: v for k, v in state.items() if "fc.weight_q" not in k}, "a.pth")
    with pytest.raises(ValueError, match=r"1 keys are missing: 'fc\.weight_quantizer"):
        restored()
    torch.save(state | {"more": torch.zeros(1)}, "a.pth")
    with pytest.raises(ValueError, match=r"(?s)must be of the model and the config.*\"more\""):
        restored()


# save_quant_retrain_model


def io_of(path: str) -> list[tuple[str, list[int | str]]]:
    graph = onnx.load(path).graph
    return [
        (v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in (*graph.input, *graph.output)
    ]


def test_names_and_sizes_of_inputs_and_outputs() -> None:
    net, x = trained_model()
    artifact = amct.save_quant_retrain_model(CONFIG, net, RECORD, "out/a", x)
    assert io_of("out/a_deploy_model.onnx") == [("x", [16, 1, 8, 8]), ("output", [16, 3])]
    assert set(artifact.files.values()) == {
        *map(Path, ("out/a_deploy_model.onnx", "out/a_fake_quant_model.onnx", RECORD))
    }
    amct.save_quant_retrain_model(
        CONFIG, net, RECORD, "out/b", x, ["image"], ["logits"], {"image": {0: "n"}, "logits": [0]}
    )
    assert io_of("out/b_deploy_model.onnx") == [
        ("image", ["batch", 1, 8, 8]),
        ("logits", ["batch", 3]),
    ]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"input_names": ["a", "b"]}, r"input_names must be 1 different names, for \['x'\]; got"),
        ({"output_names": []}, r"output_names must be 1 different names, for \['output'\]; got"),
        ({"dynamic_axes": {"y": {0: "n"}}}, r"must name inputs and outputs, \['x'\] and \['out"),
        ({"dynamic_axes": {"x": {0: "n", 2: "h"}}}, r"the first dimension \(0\) only; got .*\[2\]"),
    ],
)
def test_names_that_do_not_fit_are_refused(arguments: Any, reason: str) -> None:
    net, x = trained_model()
    with pytest.raises(ValueError, match=reason):
        amct.save_quant_retrain_model(CONFIG, net, RECORD, "out/a", x, **arguments)
    assert not Path("out").exists()


def test_a_model_that_is_not_that_of_the_configuration_is_refused() -> None:
    _, x = trained_model()
    with pytest.raises(ValueError, match=r"\['conv', 'up', 'fc'\] are float\. Save what create_"):
        amct.save_quant_retrain_model(CONFIG, Network(), RECORD, "out/a", x)


def test_a_model_that_has_seen_too_few_batches_is_refused_by_name() -> None:
    net, data = Network(), batches(1)
    amct.create_quant_retrain_config(CONFIG, net, data[0][0], CFG)
    net = amct.create_quant_retrain_model(CONFIG, net, RECORD, data[0][0])
    train(net, data)
    with pytest.raises(ValueError, match="conv: only 1 of 2 calibration batches have passed"):
        amct.save_quant_retrain_model(CONFIG, net, RECORD, "out/a", data[0][0])


def test_weights_of_4_bits_are_packed_and_the_record_says_so() -> None:
    Path(CFG).write_text("retrain_weight_quant_config { arq_retrain { dst_type: INT4 } }")
    net, x = trained_model()
    amct.save_quant_retrain_model(CONFIG, net, RECORD, "out/a", x)
    shapes = {i.name: list(i.dims) for i in onnx.load("out/a_deploy_model.onnx").graph.initializer}
    # One input channel has no second one to share a byte with.
    assert shapes["conv.weight"] == [8, 1, 3, 3]
    assert shapes["up.weight"] == [4, 4, 2, 2]
    assert shapes["fc.weight"] == [512, 3]
    types = [record.wts_type for record in parse_record(Path(RECORD).read_text())]
    assert types == ["INT8", "INT4", "INT4"]
