"""What each layer costs: measured one by one, against the recipe that does the same."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import Recipe, Sensitivity, WeightSpec, prepare, sensitivity, suggest
from lightning_qat.calibrate.batches import as_batches, observe
from lightning_qat.insight.sensitivity.candidates import Candidates
from lightning_qat.insight.sensitivity.suggest import _with_changes
from lightning_qat.quantizers.switches import switch
from tests.models import ResidualAdd, linear


class SharedInput(nn.Module):
    """Three projections of one tensor, an addition that reads it, too, and tied rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(12, 8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.rows.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.rows(index)
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        x = x + scores.softmax(-1) @ self.v(x)
        return self.head(F.relu(self.lstm(x)[0]))


def chain(layers: int, *fragile: int, far: float = 40.0) -> nn.Sequential:
    """Linear layers of 8 features, each with a relu; their first feature is always zero.

    A fragile layer has one far weight, which reads that feature: its scale leaves the others few
    steps, and its float output is what it was.
    """
    parts: list[nn.Module] = []
    for number in range(layers):
        layer = nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(8) * 0.8 + torch.rand(8, 8) * 0.1)
            layer.weight[0] = 0.0
            if number in fragile:
                layer.weight[:, 0] = far
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts).eval()


def without_first_feature(*shape: int) -> Tensor:
    return torch.rand(*shape, 8) * torch.tensor([0.0] + [1.0] * 7)


@torch.no_grad()
def sqnr(model: nn.Module, quantized: nn.Module, x: Tensor) -> float:
    exact, found = model(x).double(), quantized(x).double()
    return float(10 * (exact.square().sum() / (exact - found).square().sum()).log10())


def quantized_by(model: nn.Module, recipe: Recipe, x: Tensor) -> nn.Module:
    """What prepare and calibration make of a model."""
    made = copy.deepcopy(model)
    prepare(made, recipe, x)
    observe(made, as_batches(x))
    switch(made, quantizing=True)
    return made


def candidates_of(result: Sensitivity) -> Candidates:
    assert result.candidates is not None
    return result.candidates


def test_two_planted_fragile_layers_are_found_exactly() -> None:
    x = without_first_feature(64)
    result = sensitivity(chain(10, 3, 7), "int8", data=[x], progress=False)
    first, second, third = result.ranking[:3]
    assert {first.layer, second.layer} == {"6", "14"}
    assert min(first.drop, second.drop) > 20 * third.drop


def test_a_row_is_the_recipe_that_quantizes_that_layer_alone() -> None:
    model, x = linear().eval(), torch.randn(32, 6)
    recipe = Recipe(joins=False, outputs=False)
    result = sensitivity(model, recipe, data=[x], progress=False)
    assert [row.layer for row in result.rows] == ["0", "2"]
    for row in result.rows:
        alone = quantized_by(model, Recipe(joins=False, outputs=False, include=(row.layer,)), x)
        assert row.value == pytest.approx(sqnr(model, alone, x), abs=1e-6)
        assert row.drop == pytest.approx(10 ** (-row.value / 10), rel=1e-9)


CHANGES: dict[str, tuple[Any, Any, list[dict[str, int | None]]]] = {
    "residual": (
        ResidualAdd,
        lambda: torch.randn(8, 4, 6, 6),
        [{"conv1": None}, {"head": None}, {"conv1": 2, "conv2": 8}, {"conv2": None, "head": 4}],
    ),
    "shared input": (
        SharedInput,
        lambda: torch.randint(0, 12, (4, 6)),
        [
            {"q": None},
            {"q": None, "k": None},
            {"k": 8, "v": 2},
            {"q": None, "k": None, "v": None},
            {"rows": None, "lstm": 8},
            {"head": None},
            {"head": 8, "q": 2, "lstm": None},
        ],
    ),
}


@pytest.mark.parametrize(
    ("network", "calibration"),
    [("residual", "moving_average"), ("residual", "mse"), ("shared input", "moving_average")],
)
def test_a_candidate_is_the_recipe_that_describes_it(network: str, calibration: str) -> None:
    """Switched quantizers give what prepare and calibration give with overrides."""
    make, inputs, changes = CHANGES[network]
    model, x = make().eval(), inputs()
    recipe = Recipe.from_dict({"preset": "w4a4", "activation": {"calibration": calibration}})
    result = sensitivity(model, recipe, data=[x], progress=False)
    candidates = candidates_of(result)
    for change in changes:
        value = candidates.measure(candidates.everything() | change, str(change))
        anew = quantized_by(model, _with_changes(result, change), x)
        # Sums of float32 in another order.
        assert value == pytest.approx(sqnr(model, anew, x), abs=1e-4)


def test_all_but_one_wins_back_what_that_layer_costs() -> None:
    x = without_first_feature(64)
    result = sensitivity(chain(4, 2), "int8", data=[x], mode="all_but", progress=False)
    assert result.ranking[0].layer == "4"
    assert result.ranking[0].value > result.quantized_value + 10
    assert all(row.value >= result.quantized_value - 3 for row in result.rows)


def test_fewer_bits_cost_more() -> None:
    result = sensitivity(
        chain(3), "int8", data=[without_first_feature(64)], bits=(8, 4, 2), progress=False
    )
    for layer in ("0", "2", "4"):
        rows = {row.bits: row for row in result.rows if row.layer == layer}
        assert set(rows) == {8, 4, 2}
        assert rows[2].drop > 5 * rows[4].drop > 25 * rows[8].drop
        assert {row.input_bits for row in rows.values()} == {8}


def test_more_bits_are_given_to_the_input_as_well() -> None:
    result = sensitivity(
        ResidualAdd().eval(), "w4a4", data=torch.randn(8, 4, 6, 6), bits=(8, 4), progress=False
    )
    assert {(r.bits, r.input_bits) for r in result.rows if r.layer == "conv2"} == {(8, 8), (4, 4)}


def accuracy(model: nn.Module) -> Any:
    """How often a model says what a fixed line between two classes says."""
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
    return (model(x)[:, 0] > 0).eq(x.sum(1) > 0).float().mean()


def test_a_metric_of_ones_own_needs_no_data() -> None:
    """The calls of the evaluation calibrate; a tensor of one value is a number."""
    result = sensitivity(linear().eval(), "w4a4", accuracy, progress=False)
    assert result.float_value == pytest.approx(float(accuracy(linear())), abs=1.0)
    for row in result.rows:
        assert row.drop == pytest.approx(result.float_value - row.value)


def test_the_model_stays_as_it_is() -> None:
    model = ResidualAdd()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sensitivity(model, "int8", data=torch.randn(4, 4, 6, 6), progress=False)
    assert model.training
    assert type(model.conv1) is nn.Conv2d
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_trained_model_keeps_its_ranges() -> None:
    """What is measured of a prepared model has its ranges, not those of the data."""
    model, x = ResidualAdd().eval(), torch.randn(8, 4, 6, 6)
    trained = quantized_by(model, Recipe(), x)
    result = sensitivity(trained, "int8", data=3 * x, progress=False)
    assert result.quantized_value == pytest.approx(sqnr(model, trained, 3 * x), abs=1e-6)


def test_it_goes_on_after_a_crash(tmp_path: Path) -> None:
    file, x = tmp_path / "layers.json", without_first_feature(64)
    model, calls = chain(4, 1), []

    def evaluate(quantized: nn.Module) -> float:
        calls.append(0)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return -float((quantized(x) - model(x)).square().mean())

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, "int8", evaluate, data=[x], resume=file, progress=False)
    kept = Sensitivity.load(file).rows
    # The float model, the quantized one, and three layers before the crash.
    assert [row.layer for row in kept] == ["0", "2", "4"]
    result = sensitivity(model, "int8", evaluate, data=[x], resume=file, progress=False)
    assert result.rows[:3] == kept
    assert len(calls) == 6 + 2 + 2
    assert [row.layer for row in result.rows] == ["0", "2", "4", "6", "7.output_0_0"]
    assert Sensitivity.load(file) == result


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    file, x = tmp_path / "layers.json", without_first_feature(64)
    sensitivity(chain(2), "int8", data=[x], resume=file, progress=False)
    for model, recipe, data in (
        (chain(2), "int8", x),
        (chain(3), "int8", x),
        (chain(2), "w4a8", x),
    ):
        with pytest.raises(
            ValueError, match=r"measurements of another model, recipe, mode or data"
        ):
            sensitivity(model, recipe, data=[data], resume=file, progress=False)
    file.write_text("{}")
    with pytest.raises(ValueError, match="is no sensitivity result"):
        sensitivity(chain(2), "int8", data=[x], resume=file, progress=False)


def test_a_result_is_a_table_and_a_json_file(tmp_path: Path) -> None:
    result = sensitivity(chain(3, 1), "int8", data=[without_first_feature(64)], progress=False)
    head, columns, first, *_ = str(result).splitlines()
    assert head.startswith("SQNR (dB): float inf, all quantized ")
    assert columns.split() == ["layer", "kind", "bits", "SQNR", "(dB)", "noise", "/", "signal"]
    assert first.split()[:3] == ["2", "Linear", "8/8"]
    result.save(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["float_value"] == "inf"
    loaded = Sensitivity.load(tmp_path / "result.json")
    assert loaded == result
    assert str(loaded) == str(result)
    with pytest.raises(ValueError, match=r"resume= this file: it measures no layer again"):
        suggest(loaded, 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {}}, r"\['rows'\] must be a list; got {}"),
        ({"rows": [{"layer": "2"}]}, r"\['rows'\]\[0\] must have the key 'kind'"),
        ({"float_value": "nan"}, r"\['float_value'\] must be float or 'inf' or '-inf'; got 'nan'"),
        ({"float_value": math.nan}, "must hold numbers; the float_value is NaN"),
        ({"mode": "both"}, r"\['mode'\] must be 'only' or 'all_but'; got 'both'"),
        ({"sizes": [[1]]}, r"\['sizes'\]\[0\] must be a mapping; got \[1\]"),
        ({"recipe": None}, r"\['recipe'\] must be a mapping"),
        ({"format": None}, "begins with format"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    good = Sensitivity((), "SQNR (dB)", "only", {}, math.inf, 20.0).to_dict()
    assert Sensitivity.from_dict(good).float_value == math.inf
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**good, **change}))
    with pytest.raises(ValueError, match=rf"result\.json' is no sensitivity result: .*{message}"):
        Sensitivity.load(path)


def test_a_plot_is_drawn_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = sensitivity(chain(3, 1), "int8", data=[without_first_feature(64)], progress=False)
    result.plot(tmp_path / "layers.svg")
    assert "<svg" in (tmp_path / "layers.svg").read_text()


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    result = sensitivity(chain(2), "int8", data=[without_first_feature(8)], progress=False)
    with pytest.raises(ImportError, match=r"pip install 'lightning-qat\[report\]'"):
        result.plot(tmp_path / "layers.svg")


class Unlucky(nn.Module):
    """A layer that forward never runs, beside one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)
        self.deep = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.used(x)
        return self.spare(x) if self.deep else x


def test_layers_that_the_evaluation_does_not_run_are_said() -> None:
    model = Unlucky()
    result = sensitivity(
        model,
        "int8",
        lambda m: m.used(torch.ones(2, 8)).sum(),
        data=torch.rand(4, 8),
        progress=False,
    )
    assert [row.layer for row in result.rows] == ["used", "used.output_0_0"]
    model.deep = True

    def shallow(quantized: Any) -> float:
        quantized.deep = False
        return float(quantized(torch.ones(2, 8)).sum())

    result = sensitivity(model, "int8", shallow, data=torch.rand(4, 8), progress=False)
    assert result.never_run == ("spare",)
    assert "never run by the evaluation: spare" in str(result)


def in_training(model: nn.Module) -> float:
    model.train()
    return float(model(torch.randn(4, 4, 6, 6)).sum())


def training_step(model: Any) -> float:
    with torch.enable_grad():
        model(torch.randn(4, 4, 6, 6)).sum().backward()
    with torch.no_grad():
        model.head.weight.sub_(model.head.weight.grad)
    return 1.0


def writing_data(model: Any) -> float:
    model.conv1.weight.data.mul_(0.5)
    return float(model(torch.randn(4, 4, 6, 6)).sum())


@pytest.mark.parametrize(
    ("evaluate", "name"),
    [(in_training, "bn1"), (training_step, "head.weight"), (writing_data, "conv1.weight")],
)
def test_an_evaluation_that_changes_the_model_is_refused(evaluate: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"must leave the model as it is; it changed '{name}"):
        sensitivity(ResidualAdd(), "int8", evaluate, data=torch.randn(4, 4, 6, 6), progress=False)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (math.nan, ValueError, r"finite number; got nan \(measured: the float model"),
        (torch.ones(3), TypeError, r"got a Tensor of 3 values. Return one of them, or their mean"),
        (None, TypeError, "got a None. Add a return statement"),
        ([{"acc": 1.0}], TypeError, r"got a list. Return one entry, such as trainer.validate"),
    ],
)
def test_what_is_no_metric_is_refused(value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        sensitivity(linear(), "int8", lambda m: value, data=torch.rand(4, 6), progress=False)


def test_a_metric_that_breaks_down_names_the_layer() -> None:
    def evaluate(model: Any) -> float:
        exact = model[0](torch.ones(1, 6)).equal(plain[0](torch.ones(1, 6)))
        return 1.0 if exact else math.nan

    plain = linear()
    with pytest.raises(ValueError, match=r"got nan \(measured: everything quantized\)"):
        sensitivity(plain, "w4a4", evaluate, data=torch.rand(4, 6), progress=False)


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing to measure": (linear, {}, "needs something to measure"),
    "empty data": (linear, {"data": []}, "at least one batch of what forward takes; it is empty"),
    "labels": (
        linear,
        {"data": [(torch.rand(4, 6), torch.zeros(4))]},
        r"got \(float32\[4, 6\], float32\[4\]\).*data=\[x for x, _ in loader\]",
    ),
    "no layers": (nn.ReLU, {"data": torch.rand(4, 6)}, "Nothing to quantize in ReLU"),
    "an empty recipe": (
        linear,
        {"data": torch.rand(4, 6), "recipe": Recipe(exclude=("*",))},
        "Nothing to quantize in Sequential",
    ),
    "a mode": (linear, {"data": torch.rand(4, 6), "mode": "one"}, "'only' or 'all_but'"),
    "bits": (linear, {"data": torch.rand(4, 6), "bits": 8}, r"such as \(8, 4, 2\); got 8"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case: str) -> None:
    make, arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        sensitivity(make(), progress=False, **arguments)


def test_another_recipe_than_a_prepared_models_is_refused() -> None:
    four = Recipe(weight=WeightSpec(bits=4))
    model = quantized_by(linear(), four, torch.rand(4, 6))
    with pytest.raises(ValueError, match=r"recipe must be the one that the model was prepared"):
        sensitivity(model, "int8", data=torch.rand(4, 6), progress=False)
    assert sensitivity(model, four, data=torch.rand(4, 6), progress=False).rows


def test_an_evaluation_that_never_calls_the_model_needs_data() -> None:
    with pytest.raises(ValueError, match=r"never calls Sequential itself.*pass data="):
        sensitivity(linear(), "int8", lambda m: 1.0, progress=False)
