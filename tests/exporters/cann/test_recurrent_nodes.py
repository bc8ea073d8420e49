"""LSTM and GRU as the device nodes that AMCT writes, and what is said of them."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_qat import QuantizedModel, convert, convert_qat_model, export, prepare, verify
from lightning_qat.amct.record import parse_record
from lightning_qat.export.protocol import Artifact
from lightning_qat.numerics.qparams import IntegerGrid, QParams
from lightning_qat.quantizers.final import FinalActivation
from lightning_qat_exporters import CannExporter
from lightning_qat_exporters.cann import AscendExecutor
from lightning_qat_exporters.onnx_files.run import run_onnx
from tests.exporters.cann.amct_goldens import GOLDENS, Case, attributes_of, load_case

# One worker writes each of AMCT's networks once.
pytestmark = pytest.mark.xdist_group("recurrent nodes")

CASES = ("lstm", "lstm_pt", "gru", "gru_seq4")
UNSUPPORTED = (
    "no current product supports it by Huawei's documents, and kernels require a sequence length "
    "of 1; this is one of {steps}."
)


def device() -> CannExporter:
    return CannExporter(rnn="device")


class Streaming(nn.Module):
    """A recurrent layer that takes and gives its state."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, h: Tensor, c: Tensor | None = None) -> Any:
        output, state = self.rnn(x, h if c is None else (h, c))
        return output, *(state if isinstance(state, tuple) else (state,))


def golden_model(case: Case) -> QuantizedModel:
    """The network as AMCT trained it, with AMCT's activation scales, converted."""
    kind = nn.LSTM if case.name.startswith("lstm") else nn.GRU
    net = Streaming(kind(8, 16)).eval()
    prepare(net, case.deploy_path.with_name("config.json"))
    prefix = "rnn.quant_module.replaced_module."
    state = {k.removeprefix(prefix): v for k, v in case.state.items() if k.startswith(prefix)}
    net.rnn.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=False)
    record = case.records["rnn"]
    assert record.scale_h is not None
    for name, scale, offset in (
        ("input_quantizer", record.scale_d, record.offset_d),
        ("hidden_quantizer_l0", record.scale_h, record.offset_h),
    ):
        numbers = (
            torch.tensor(scale),
            torch.tensor(offset, dtype=torch.int32),
            IntegerGrid.signed(8),
        )
        key = f"rnn.{name.replace('_quantizer', '')}"
        setattr(net.rnn, name, FinalActivation(QParams(*numbers), key))
    return convert(net, tuple(map(torch.from_numpy, case.inputs.values())), dynamic_batch=False)


def recurrent_view(model: onnx.ModelProto) -> dict[str, Any]:
    """Everything a deploy model says about its recurrent node; equal or not, never close."""
    arrays = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    inputs = {v.name: f"<input {i}>" for i, v in enumerate(model.graph.input)}
    outputs = {v.name: f"<output {i}>" for i, v in enumerate(model.graph.output)}
    (node,) = (n for n in model.graph.node if n.op_type.startswith("Basic"))
    squeeze = model.graph.node[-1]
    return {
        "ops": [n.op_type for n in model.graph.node],
        "node": (node.op_type, node.name, node.domain),
        "attributes": attributes_of(node),
        "inputs": [
            (str(arrays[n].dtype), arrays[n].shape, arrays[n].tolist())
            if n in arrays
            else inputs.get(n, n)
            for n in node.input
        ],
        "parameter": node.input[-1],
        "outputs": [outputs.get(n, "<inner>") for n in node.output],
        "squeeze": (attributes_of(squeeze), squeeze.input[0] == node.output[0]),
        "opset": [(o.domain, o.version) for o in model.opset_import],
    }


def written(model: QuantizedModel, prefix: Path, steps: int) -> Artifact:
    with pytest.warns(UserWarning, match=re.escape(UNSUPPORTED.format(steps=steps))):
        return export(model, device(), prefix)


Golden = tuple[Case, QuantizedModel, Artifact]


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """What AMCT wrote, and our model and files of the same network."""
    case = load_case(request.param)
    model = golden_model(case)
    steps = 4 if case.name == "gru_seq4" else 1
    return case, model, written(model, tmp_path_factory.mktemp(case.name) / "net", steps)


def test_the_deploy_file_and_the_record_equal_amcts(golden: Golden) -> None:
    case, _, artifact = golden
    assert recurrent_view(onnx.load(artifact.files["model"])) == recurrent_view(case.deploy)
    assert parse_record(artifact.files["record"].read_text()) == tuple(case.records.values())


def test_the_executor_computes_what_amcts_simulation_computed(golden: Golden) -> None:
    case, model, artifact = golden
    theirs = AscendExecutor(case.deploy_path).run(case.inputs)
    for ours, wanted in zip(theirs, case.outputs, strict=True):
        # ONNX Runtime's sigmoid and tanh are approximations of their own.
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=3e-7)
    executor = AscendExecutor(artifact.files["model"])
    inputs = dict(zip(executor.input_names, case.inputs.values(), strict=True))
    for ours, wanted in zip(executor.run(inputs), theirs, strict=True):
        np.testing.assert_array_equal(ours, wanted)
    assert device().differences(model, artifact) == ()


def test_the_fake_quant_model_rounds_the_hidden_state_at_every_step(golden: Golden) -> None:
    case, model, artifact = golden
    values = dict(zip(model.input_names, case.inputs.values(), strict=True))
    simulated = run_onnx(artifact.files["fake_quant"], values, optimize=False)
    trained = model.flat_outputs(model(*map(torch.from_numpy, values.values())))
    for key, wanted in trained.items():
        # Biases are rounded to the accumulator's grid, 1e-5.
        np.testing.assert_allclose(simulated[key], wanted.numpy(), rtol=0, atol=1e-4)


def test_a_changed_number_in_the_file_is_found(tmp_path: Path) -> None:
    case = load_case("lstm")
    model = golden_model(case)
    artifact = written(model, tmp_path / "net", 1)
    original = onnx.load(artifact.files["model"])
    for index, what in ((1, "weight_ih"), (2, "weight_hh"), (5, "bias"), (8, "dequant parameter")):
        changed = copy.deepcopy(original)
        (node,) = (n for n in changed.graph.node if n.op_type.startswith("Basic"))
        (tensor,) = (i for i in changed.graph.initializer if i.name == node.input[index])
        array = numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[3] += 1
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        onnx.save(changed, artifact.files["model"])
        (difference,) = device().differences(model, artifact)
        assert difference.startswith(f"rnn: {what} must be")
    (node,) = (n for n in original.graph.node if n.op_type.startswith("Basic"))
    next(a for a in node.attribute if a.name == "quant_scale_h").f *= 1.5
    onnx.save(original, artifact.files["model"])
    (difference,) = device().differences(model, artifact)
    assert difference.startswith("rnn: quant_scale_h must be")


# Our own layers in every form that has a node


def converted(net: nn.Module, *inputs: Tensor, recipe: Any = "int8") -> QuantizedModel:
    torch.manual_seed(1)
    prepare(net, recipe, inputs)
    for _ in range(2):
        net.train()(*inputs)
    return convert(net.eval(), inputs)


class Model(nn.Module):
    """Linear, a recurrent layer that starts at zero, and a head over all steps."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3)
        self.rnn = rnn
        self.head = nn.Linear((rnn.proj_size or 4) * (2 if rnn.bidirectional else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x).relu())[0])


# Every pair of a kind, a bias or none, and a batch first or one sequence.
@pytest.mark.parametrize(
    ("kind", "bias", "shape"),
    [
        pytest.param(nn.LSTM, True, (5, 1, 3), id="LSTM-bias-batch first"),
        pytest.param(nn.LSTM, False, (1, 3), id="LSTM-no bias-one sequence"),
        pytest.param(nn.GRU, True, (1, 3), id="GRU-bias-one sequence"),
        pytest.param(nn.GRU, False, (5, 1, 3), id="GRU-no bias-batch first"),
    ],
)
def test_a_step_is_that_of_the_trained_layer(
    kind: Any, bias: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    net, x = Model(kind(3, 4, bias=bias, batch_first=len(shape) == 3)), torch.randn(shape)
    model = converted(net, x)
    artifact = written(model, tmp_path / "net", 1)
    (node,) = (
        n for n in onnx.load(artifact.files["model"]).graph.node if n.op_type.startswith("Basic")
    )
    assert node.name == "rnn"
    assert (node.input[5 if kind is nn.LSTM else 4] == "") == (not bias)
    agreement = verify(model, artifact, exporter=device())
    assert agreement.parameters_equal, agreement
    assert agreement.max_steps <= 1.001, agreement
    assert device().lint(artifact.files["model"])[0].node == "rnn"


def test_the_hidden_state_may_leave_at_several_places(tmp_path: Path) -> None:
    inputs = torch.randn(1, 2, 3), torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    model = converted(Streaming(nn.LSTM(3, 4)), *inputs)
    agreement = verify(model, written(model, tmp_path / "net", 1), exporter=device())
    assert agreement.max_steps <= 1.001, agreement


def test_without_the_option_steps_are_unrolled_and_the_option_is_named(tmp_path: Path) -> None:
    model = converted(Model(nn.GRU(3, 4)), torch.randn(5, 2, 3))
    artifact = export(model, "cann", tmp_path / "net")
    assert artifact.notes == (
        "'rnn': its steps are unrolled into integer matrix products with float gates between them; "
        "CannExporter(rnn='device') writes the device's own node for it.",
    )
    ops = {n.op_type for n in onnx.load(artifact.files["model"]).graph.node}
    assert not any(op.startswith("Basic") for op in ops)


class Twice(Streaming):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.rnn(x)[0] + self.rnn(-x)[0]


ONE_LAYER = "it must have one layer, one direction and no projection"


@pytest.mark.parametrize(
    ("net", "recipe", "reason"),
    [
        (Model(nn.GRU(3, 4, bidirectional=True)), "int8", ONE_LAYER),
        (Model(nn.LSTM(3, 4, num_layers=2)), "int8", ONE_LAYER),
        (Model(nn.LSTM(3, 4, proj_size=2)), "int8", ONE_LAYER),
        (Twice(nn.GRU(3, 4)), "int8", "it is called more than once"),
        (
            Model(nn.GRU(3, 4)),
            "w4a4",
            "its input and hidden state must have 8 bits; they run over [(-8, 7)]",
        ),
    ],
    ids=["directions", "layers", "projection", "twice", "4 bits"],
)
def test_what_has_no_node_stays_unrolled_and_is_named(
    net: nn.Module, recipe: str, reason: str, tmp_path: Path
) -> None:
    model = converted(net, torch.randn(2, 2, 3), recipe=recipe)
    artifact = export(model, device(), tmp_path / "net")
    (note,) = artifact.notes
    assert re.fullmatch(
        rf"'rnn': (LSTM|GRU) has no device node: {re.escape(reason)}\. "
        r"It is computed step by step on integers\.",
        note,
    )
    ops = {n.op_type for n in onnx.load(artifact.files["model"]).graph.node}
    assert not any(op.startswith("Basic") for op in ops)


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="rnn must be 'unrolled' or 'device'; got 'npu'"):
        CannExporter(rnn="npu")  # type: ignore[arg-type]


# Models of other tools

INTER = GOLDENS / "single_op" / "lstm_arq_cw_inter.onnx"


def test_amcts_intermediate_lstm_becomes_a_device_node(tmp_path: Path) -> None:
    record = tmp_path / "record.txt"
    with pytest.warns(UserWarning, match="no current product supports it"):
        done = convert_qat_model(INTER, tmp_path / "net", record, target=device())
    assert done.layers == ("/m/LSTM",)
    assert (done.joins, done.left_float) == ((), ())
    (note,) = done.notes
    assert UNSUPPORTED.format(steps=1) in note
    (entry,) = parse_record(record.read_text())
    assert (len(entry.scale_w), len(entry.scale_r)) == (64, 64)
    arrays = np.load(INTER.with_name("lstm_arq_cw_io.npz"))
    executor = AscendExecutor(done.files["model"])
    names = executor.input_names
    inputs = {name: arrays[key] for name, key in zip(names, ("in0", "in1", "in2"), strict=True)}
    deploy = executor.run(inputs)
    fake = list(run_onnx(done.files["fake_quant"], inputs, optimize=False).values())
    for ours, simulated, key in zip(deploy, fake, ("out0", "out1", "out2"), strict=True):
        np.testing.assert_allclose(ours, simulated, rtol=0, atol=3e-7)
        # Their biases are real.
        np.testing.assert_allclose(ours, arrays[key].reshape(ours.shape), rtol=0, atol=1e-4)


@pytest.mark.parametrize("float_bias", [False, True])
def test_without_the_option_it_stays_float_and_the_option_is_named(
    float_bias: bool, tmp_path: Path
) -> None:
    exporter = device() if float_bias else CannExporter()
    done = convert_qat_model(INTER, tmp_path / "net", target=exporter, float_bias=float_bias)
    assert done.layers == ()
    assert done.left_float == (
        "'/m/LSTM': LSTM keeps real weights. CannExporter(rnn='device') writes the device's own "
        "node for it.",
    )


def broken(change: Any) -> onnx.ModelProto:
    model = onnx.load(INTER)
    (node,) = (n for n in model.graph.node if n.op_type == "LSTM")
    change(node)
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda n: n.attribute.append(onnx.helper.make_attribute("clip", 3.0)),
            "its clip must be None; it is 3.0",
        ),
        (
            lambda n: n.input.__setitem__(5, "inputs.3"),
            "its initial hidden state must be quantized, which tells its scale",
        ),
        (lambda n: n.input.__setitem__(6, ""), "its initial cell state must be given"),
    ],
    ids=["clip", "real state", "no cell state"],
)
def test_an_lstm_without_a_node_stays_float_with_the_reason(
    change: Any, reason: str, tmp_path: Path
) -> None:
    onnx.save(broken(change), tmp_path / "model.onnx")
    done = convert_qat_model(tmp_path / "model.onnx", tmp_path / "net", target=device())
    assert done.left_float == (f"'/m/LSTM': it has no device node: {reason}.",)


def test_the_executor_names_an_attribute_that_is_not_defined() -> None:
    model = onnx.load(GOLDENS / "gru" / "m_deploy_model.onnx")
    next(a for a in model.graph.node[0].attribute if a.name == "clip").f = 2.0
    case = load_case("gru")
    with pytest.raises(ValueError, match=r"clip of 'rnn' must be -1.0; got 2.0"):
        AscendExecutor(model).run(case.inputs)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("features", [6, 3])
def test_weights_of_4_bits_are_packed_where_both_have_an_even_number_of_inputs(
    kind: Any, features: int, tmp_path: Path
) -> None:
    recipe = {"preset": "int8", "weight": {"bits": 4}, "first_last": None}
    inputs = torch.randn(1, 2, features), torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    inputs = inputs if kind is nn.LSTM else inputs[:2]
    model = converted(Streaming(kind(features, 4)), *inputs, recipe=recipe)
    exporter = CannExporter(rnn="device", int4_weights=True)
    with pytest.warns(UserWarning, match="best effort"):
        artifact = exporter.export(model, tmp_path / "net")
    (node,) = (
        n for n in onnx.load(artifact.files["model"]).graph.node if n.op_type.startswith("Basic")
    )
    shapes = {i.name: list(i.dims) for i in onnx.load(artifact.files["model"]).graph.initializer}
    rows = 16 if kind is nn.LSTM else 12
    packed = features % 2 == 0
    assert shapes[node.input[1]] == [1, rows, features // 2 if packed else features]
    assert shapes[node.input[2]] == [1, rows, 2 if packed else 4]
    (record,) = parse_record(artifact.files["record"].read_text())
    assert record.wts_type == ("INT4" if packed else "INT8")
    agreement = verify(model, artifact, exporter=exporter)
    assert agreement.parameters_equal, agreement
    assert all(runtime.max_steps <= 1.001 for runtime in agreement.runtimes), agreement
