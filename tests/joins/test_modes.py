"""A forward that computes something else in eval mode: the plan is that of what is exported."""

from typing import Any

import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import calibrate_unseen, convert, export, prepare
from lightning_qat.joins.apply import plan_of
from lightning_qat.joins.plan import JoinPlan
from lightning_qat.training.range_sync import activation_quantizers

EXAMPLES = [None, torch.randn(2, 4)]
PLANNED = ["first forward", "example inputs"]


class Decodes(nn.Module):
    """Decodes in eval mode alone, as detectors do: another tensor is leaf 0 of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.layer(x)
        return z if self.training else z * 100


class SameOperator(Decodes):
    """Both modes end with a product, in two places."""

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.layer(x)
        if self.training:
            return z * 0.5
        return z * 100


class Auxiliary(nn.Module):
    """Two outputs in training, one of another kind in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.aux = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        if self.training:
            return self.aux(x) + self.head(x), self.head(x)
        return torch.softmax(self.head(x), -1)


def trained(model: Any, example: Tensor | None) -> Any:
    prepare(model, "int8", example)
    for _ in range(3):
        model(data())
    return model


def data() -> Tensor:
    """Real values that fill a range known before."""
    return torch.rand(64, 4) * 2 - 1


def the_plan(model: nn.Module) -> JoinPlan:
    plan = plan_of(model)
    assert plan is not None
    return plan


@pytest.mark.parametrize("example", EXAMPLES, ids=PLANNED)
@pytest.mark.parametrize("kind", [Decodes, SameOperator])
def test_no_range_is_applied_to_another_tensor(kind: Any, example: Tensor | None) -> None:
    torch.manual_seed(0)
    model = trained(kind(), example)
    quantizers = activation_quantizers(model)
    assert list(quantizers) == ["layer.input_quantizer", "qat_joins.output_0_0"]
    # Training has never computed what is exported.
    assert not quantizers["qat_joins.output_0_0"].calibrated
    x = data()
    with pytest.raises(ValueError, match=r"output_0_0: no training batch .* calibrate_unseen"):
        convert(model, x)
    assert calibrate_unseen(model, x) == ("output_0_0",)
    found = convert(model, x).program.module()(x)
    floats = 100 * F.linear(x, model.layer.weight, model.layer.bias).detach()
    # One step of 256 over the range of the data.
    step = float(floats.max() - floats.min()) / 255
    assert float((found - floats).abs().max()) < 5 * step
    assert float(found.max()) > 50


@pytest.mark.parametrize("example", EXAMPLES, ids=PLANNED)
def test_layers_and_calls_of_training_alone_stay_float_without_a_warning(
    example: Tensor | None,
) -> None:
    model = Auxiliary()
    trained(model, example)
    assert the_plan(model).unreached == ("aux",)
    assert type(model.aux) is nn.Linear
    assert {*activation_quantizers(model)} == {
        "stem.input_quantizer",
        "head.input_quantizer",
        "qat_joins.softmax_0_0",
        "qat_joins.output_0_0",
    }
    assert calibrate_unseen(model, torch.randn(8, 4)) == ("softmax_0_0",)
    converted = convert(model, torch.randn(8, 4))
    assert converted.output_names == ("output",)


def test_the_file_of_a_network_that_decodes_computes_the_network(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = trained(Decodes(), torch.randn(2, 4)), torch.randn(32, 4)
    calibrate_unseen(model, x)
    artifact = export(convert(model, x), "fake_quant_onnx", tmp_path / "net")
    # As it is written: on CPUs without VNNI products of 8 bits saturate in the optimized session.
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(artifact.files["model"], options)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted = model.eval()(x).detach()
    assert float((torch.from_numpy(found) - wanted).abs().max()) <= 2 * float(
        model.qat_joins["output_0_0"].qparams().scale
    )


def test_a_forward_that_fails_in_eval_mode_is_planned_in_training() -> None:
    class Trains(Decodes):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise RuntimeError("no weights for inference")
            result: Tensor = self.layer(x)
            return result

    with pytest.warns(UserWarning, match="does not run in eval mode .* no weights for inference"):
        model = trained(Trains(), None)
    assert len(the_plan(model).tensors) == 2


@pytest.mark.parametrize("example", EXAMPLES, ids=PLANNED)
def test_what_the_forward_never_runs_is_not_quantized(example: Tensor | None) -> None:
    class Distilled(Decodes):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    model = Distilled()
    before = model.teacher(torch.ones(1, 4))
    report = prepare(model, "int8", example)
    model(torch.randn(16, 4))
    assert the_plan(model).unreached == ("teacher.0", "teacher.2")
    assert torch.equal(model.teacher(torch.ones(1, 4)), before)
    assert report.with_plan(plan_of(model)).swapped[0].name == "layer"
    assert "teacher.0  Linear: left as it is, the exported forward never runs it" in str(
        report.with_plan(plan_of(model))
    )
    # The state_dict holds no quantizers of it, and loads into a model that has swapped it.
    state = model.state_dict()
    assert not any(key.startswith("teacher") and "quantizer" in key for key in state)
    again = Distilled()
    prepare(again, "int8")
    again.load_state_dict(state)
    assert type(again.teacher[0]) is nn.Linear


def test_a_layer_without_a_range_that_the_graph_does_not_reach_is_no_problem() -> None:
    class Optional(Decodes):
        def __init__(self) -> None:
            super().__init__()
            self.context = nn.Linear(4, 4)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            z: Tensor = self.layer(x)
            return z if context is None else z + self.context(context)

    model, x = Optional(), torch.randn(8, 4)
    prepare(model, {"joins": False, "outputs": False})
    model(x)
    assert not any("context" in key for key in convert(model, x).tensors)
    with pytest.raises(ValueError, match="context: no training batch has passed through it"):
        convert(model, (x, x))


def test_only_what_has_no_range_is_calibrated() -> None:
    model = trained(Decodes(), torch.randn(2, 4))
    before = {n: q.state_dict() for n, q in activation_quantizers(model).items()}
    x = data()
    assert calibrate_unseen(model, x) == ("output_0_0",)
    after = activation_quantizers(model)
    first = "layer.input_quantizer"
    assert torch.equal(after[first].min_val, before[first]["min_val"])
    assert calibrate_unseen(model, x) == ()
    high = float(after["qat_joins.output_0_0"].max_val)
    calibrate_unseen(model, x[:1], again=("output_0_0",))
    assert float(after["qat_joins.output_0_0"].max_val) < high
