"""Agreement: its numbers by hand, and that a changed file is found out."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.protocol import Array, Artifact, CannotRun
from lightning_qat.export.verify import (
    Agreement,
    OutputAgreement,
    RuntimeAgreement,
    compare_output,
    verify,
)
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters import FakeQuantOnnxExporter
from lightning_qat_exporters.onnx_files.run_openvino import has_openvino
from tests.models import EVERY_LAYER, Nested, inputs_for, linear, trained

# Comparing one output


def test_the_figures_of_a_comparison_worked_by_hand() -> None:
    reference = np.array([[0.0, 1.0, 2.0], [255.0, 3.0, 4.0]])
    output = np.array([[0.0, 1.25, 2.0], [252.0, 3.0, 260.0]])
    # The range is 255, so a step is 1; the differences are 0, 1/4, 0, 3, 0, 256.
    assert compare_output("y", reference, output) == OutputAgreement(
        output="y",
        step=1.0,
        max_steps=256.0,
        mean_steps=259.25 / 6,
        max_abs=256.0,
        fraction_differing=2 / 6,
        same_argmax=0.5,
    )


def test_the_step_is_a_255th_of_the_range_of_the_reference() -> None:
    found = compare_output("y", np.array([-1.0, 1.55]), np.array([-1.0, 1.53]))
    assert found.step == pytest.approx(0.01)
    assert found.max_steps == pytest.approx(2.0)
    assert found.max_abs == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("shape", "counted"), [((2,), False), ((2, 1), False), ((2, 2), True), ((1, 2, 2), True)]
)
def test_argmax_is_compared_where_rows_have_more_than_one_element(
    shape: tuple[int, ...], counted: bool
) -> None:
    values = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    assert (compare_output("y", values, values).same_argmax is not None) is counted


def test_a_constant_reference_counts_differences_as_they_are() -> None:
    found = compare_output("y", np.full(4, 2.0), np.array([2.0, 2.0, 2.0, 5.0]))
    assert (found.step, found.max_steps, found.max_abs) == (0.0, 3.0, 3.0)


def test_integer_outputs_do_not_wrap_around() -> None:
    found = compare_output("y", np.array([0, 255], np.uint8), np.array([255, 0], np.uint8))
    assert found.max_abs == 255.0


def test_nothing_agrees_with_nothing() -> None:
    assert compare_output("y", np.empty((0, 3)), np.empty((0, 3))).max_steps == 0.0


def test_what_is_not_a_number_never_agrees() -> None:
    found = compare_output("y", np.array([0.0, 1.0]), np.array([0.0, np.nan]))
    assert not found.max_steps <= 1.0


def test_shapes_must_be_equal() -> None:
    with pytest.raises(
        ValueError, match=r"Output 'y' must have shape \(2,\); the file gives \(2, 1\)"
    ):
        compare_output("y", np.zeros(2), np.zeros((2, 1)))


# Agreement


def output(steps: float) -> OutputAgreement:
    return OutputAgreement("y", 1.0, steps, 0.5, steps, 0.25, 0.75)


def test_the_first_runtime_s_worst_output_counts() -> None:
    runtimes = (
        RuntimeAgreement("literal", (output(1.0), output(3.0))),
        RuntimeAgreement("optimized", (output(9.0),)),
    )
    agreement = Agreement("t", (), runtimes, 4)
    assert agreement.max_steps == 3.0
    assert agreement.parameters_equal
    assert np.isnan(Agreement("t", (), (), 4).max_steps)


@pytest.mark.parametrize(
    ("differences", "equal", "line"),
    [
        ((), True, "t: numbers equal to the bit; 4 samples"),
        (("w: 1 of 2 values of scale differ",), False, "t: 1 numbers differ; 4 samples"),
        (None, False, "t: numbers cannot be read back; 4 samples"),
    ],
)
def test_the_printed_agreement(differences: Any, equal: bool, line: str) -> None:
    agreement = Agreement("t", differences, (RuntimeAgreement("ort", (output(2.0),)),), 4)
    assert agreement.parameters_equal is equal
    lines = str(agreement).splitlines()
    assert lines[0] == line
    assert lines[-1] == (
        "  ort, y: max 2 steps (2), mean 0.5 steps, 25.00% differ, argmax equal 75.00%"
    )
    assert len(lines) == 2 + len(differences or ())
    assert agreement.to_dict()["parameters_equal"] is equal


# A file against its model


@pytest.fixture
def converted() -> QuantizedModel:
    x = inputs_for("linear")
    model = trained(linear(), x)
    return convert(model, x)


def exported(model: QuantizedModel, folder: Path) -> tuple[FakeQuantOnnxExporter, Artifact]:
    exporter = FakeQuantOnnxExporter()
    return exporter, export(model, exporter, folder / "net")


def test_an_untouched_file_agrees(converted: QuantizedModel, tmp_path: Path) -> None:
    exporter, artifact = exported(converted, tmp_path)
    agreement = verify(converted, artifact, exporter=exporter)
    assert agreement.target == "fake_quant_onnx"
    assert agreement.parameter_differences == ()
    assert [r.runtime for r in agreement.runtimes] == [
        "onnxruntime, no optimizations",
        "onnxruntime",
        *(["openvino"] if has_openvino() else []),
    ]
    assert agreement.samples == 4
    # A last layer's float sums, in another order than torch's.
    assert agreement.max_steps < 0.01


def test_the_exporter_is_found_by_the_artifact_s_target(
    converted: QuantizedModel, tmp_path: Path
) -> None:
    _, artifact = exported(converted, tmp_path)
    assert verify(converted, artifact, inputs_for("linear", 7)).samples == 7


def change(what: str) -> Callable[[str, np.ndarray[Any, Any]], None]:
    def apply(name: str, array: np.ndarray[Any, Any]) -> None:
        if what == "scale":
            array.flat[0] = np.nextafter(array.flat[0], np.float32(1e9))
        else:
            array.flat[0] += -1 if array.flat[0] > 0 else 1

    return apply


@pytest.mark.parametrize(
    ("initializer", "what", "text"),
    [
        ("0.input_scale", "scale", "0.input: 1 of 1 values of scale differ from the model's"),
        ("2.weight_scale", "scale", "2.weight: 1 of 3 values of scale differ from the model's"),
        ("0.weight", "integers", "0.weight: 1 of 30 values of integers differ from the model's"),
        (
            "2.input_zero_point",
            "zero point",
            "2.input: 1 of 1 values of zero point differ from the model's",
        ),
    ],
)
def test_one_changed_number_is_reported_in_words(
    converted: QuantizedModel, tmp_path: Path, initializer: str, what: str, text: str
) -> None:
    exporter, artifact = exported(converted, tmp_path)
    path = artifact.files["model"]
    proto = onnx.load(path)
    stored = {i.name: i for i in proto.graph.initializer}
    # An integer matrix may be stored transposed.
    name = initializer if initializer in stored else f"{initializer}_transposed"
    array = numpy_helper.to_array(stored[name]).copy()
    change(what)(name, array)
    stored[name].CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(proto, path)
    agreement = verify(converted, artifact, exporter=exporter)
    assert agreement.parameter_differences == (text,)
    assert not agreement.parameters_equal
    assert text in str(agreement)


def test_a_removed_dequantization_is_reported(converted: QuantizedModel, tmp_path: Path) -> None:
    exporter, artifact = exported(converted, tmp_path)
    proto = onnx.load(artifact.files["model"])
    for node in proto.graph.node:
        del node.metadata_props[:]
    onnx.save(proto, artifact.files["model"])
    differences = exporter.differences(converted, artifact)
    assert set(differences) == {
        f"{key}: the file has no DequantizeLinear for it" for key in converted.tensors
    }


def test_clip_bounds_are_numbers_of_the_model_too(tmp_path: Path) -> None:
    x = inputs_for("linear")
    model = convert(trained(linear(), x, EVERY_LAYER["w4a4"]), x)
    exporter, artifact = exported(model, tmp_path)
    assert exporter.differences(model, artifact) == ()
    proto = onnx.load(artifact.files["model"])
    bound = next(i for i in proto.graph.initializer if i.name == "0.input_qmax")
    bound.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bound) + 1, bound.name))
    onnx.save(proto, artifact.files["model"])
    assert any(d.startswith("0.input: ") for d in exporter.differences(model, artifact))


def test_a_weight_dequantized_along_another_axis_is_reported(tmp_path: Path) -> None:
    model, x = nn.Conv2d(4, 4, 1), torch.randn(2, 4, 3, 3)
    quantized = convert(trained(model, x), x)
    exporter, artifact = exported(quantized, tmp_path)
    proto = onnx.load(artifact.files["model"])
    moved = [
        attribute
        for node in proto.graph.node
        for attribute in node.attribute
        if node.op_type == "DequantizeLinear" and attribute.name == "axis"
    ]
    assert len(moved) == 1
    moved[0].i = 1
    onnx.save(proto, artifact.files["model"])
    assert exporter.differences(quantized, artifact) != ()


@pytest.mark.parametrize("quantize_bias", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_changed_bias_is_reported(tmp_path: Path, quantize_bias: bool, dims: int) -> None:
    model, x = linear(), torch.randn(4, 6) if dims == 2 else torch.randn(4, 5, 6)
    quantized = convert(trained(model, x), x)
    exporter = FakeQuantOnnxExporter(quantize_bias=quantize_bias)
    artifact = exporter.export(quantized, tmp_path / "net")
    assert exporter.differences(quantized, artifact) == ()
    proto = onnx.load(artifact.files["model"])
    bias = next(i for i in proto.graph.initializer if i.name in ("0.bias", "0.bias_int32"))
    changed = numpy_helper.to_array(bias).copy()
    changed[1] += 1
    bias.CopyFrom(numpy_helper.from_array(changed, bias.name))
    onnx.save(proto, artifact.files["model"])
    (difference,) = exporter.differences(quantized, artifact)
    size = len(changed)
    assert difference == f"0: 1 of {size} values of the bias differ from the model's"


@pytest.mark.parametrize("order", [("left", "right"), ("right", "left")])
def test_keyword_inputs_may_come_in_any_order(order: tuple[str, str], tmp_path: Path) -> None:
    values = {"left": torch.randn(4, 6), "right": torch.randn(4, 6) * 5}
    quantized = convert(trained(Nested(), values), values)
    exporter, artifact = exported(quantized, tmp_path)
    agreement = verify(quantized, artifact, {name: values[name] for name in order}, exporter)
    # Float sums in another order; a step flipped by it would be 1.
    assert agreement.max_steps <= 1.0


def test_disagreement_is_reported_not_raised(converted: QuantizedModel) -> None:
    class Wrong:
        name = "wrong"
        runtimes = ("abacus",)

        def check_available(self) -> None: ...

        def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
            raise NotImplementedError

        def run(
            self, artifact: Artifact, runtime: str, inputs: Mapping[str, Array]
        ) -> dict[str, Array]:
            return {"output": np.zeros((len(inputs["input"]), 3), np.float32)}

    agreement = verify(converted, Artifact("wrong", {}), exporter=Wrong())
    assert agreement.parameter_differences is None
    assert agreement.max_steps > 10


def test_a_runtime_that_refuses_the_file_is_a_caution(
    converted: QuantizedModel, tmp_path: Path
) -> None:
    class Picky(FakeQuantOnnxExporter):
        @property
        def runtimes(self) -> tuple[str, ...]:
            return ("abacus", "onnxruntime")

        def run(
            self, artifact: Artifact, runtime: str, inputs: Mapping[str, Array]
        ) -> dict[str, Array]:
            if runtime == "abacus":
                raise CannotRun("abacus", "too few beads.\n")
            return super().run(artifact, runtime, inputs)

        def explain(self, max_steps: Mapping[str, float]) -> tuple[str, ...]:
            return (f"it ran in {', '.join(max_steps)}",)

    exporter = Picky()
    agreement = verify(converted, export(converted, exporter, tmp_path / "net"), None, exporter)
    assert [r.runtime for r in agreement.runtimes] == ["onnxruntime"]
    assert agreement.cautions == ("abacus cannot run the file: too few beads",)
    assert agreement.remarks == ("it ran in onnxruntime",)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), None, "model.pt2"])
def test_verify_takes_a_converted_model(thing: Any) -> None:
    text = rf"verify takes a QuantizedModel; got {type(thing).__name__}\. Call convert\("
    with pytest.raises(TypeError, match=text):
        verify(thing, Artifact("fake_quant_onnx", {}))
