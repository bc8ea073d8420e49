"""What the reference executor refuses of a deploy model and its inputs, and how it says so."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lightning_qat.export.protocol import Array
from lightning_qat_exporters.cann.executor.executor import AscendExecutor
from tests.exporters.cann.test_executor import f32, model_of

QUANT = {"scale": 1.0, "offset": 0.0, "dst_type": "INT8"}


def executor_of(*nodes: onnx.NodeProto, limit: int = 2**20, **constants: Array) -> AscendExecutor:
    return AscendExecutor(model_of(nodes, constants), max_bytes=limit)


def node(op_type: str, *inputs: str, output: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, [output], name=f"the_{op_type}", **attributes)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (node("AscendQuant", "x", offset=0.0), r"'the_AscendQuant' .*must have the attribute 'sca"),
        (node("AscendQuant", "x", **QUANT | {"scale": 1}), "attribute 'scale' must be a number"),
        (node("AscendQuant", "x", **QUANT | {"scale": 0.0}), "finite number other than 0; got 0.0"),
        (node("AscendQuant", "x", **QUANT | {"offset": 0.5}), "offset must be a whole number"),
        (node("AscendQuant", "x", **QUANT | {"sqrt_mode": 7}), "sqrt_mode must be 0 or 1; got 7"),
        (node("AscendQuant", "x", **QUANT, half=1), "takes no attribute 'half'"),
        (node("AscendQuant", "x", "x", **QUANT), "must have 1 to 1 inputs"),
        (node("AscendQuant", **QUANT), "must have 1 to 1 inputs; got"),
        (node("AscendDequant", "x"), r"'the_AscendDequant' .* must have 2 to 2 inputs"),
        (node("BasicGRUInplaceFillWindowCache", "x"), "must have 4 to 8 inputs"),
        (node("NoSuchOperator", "x"), "there must be such an operator"),
        (node("MaxPool", "x", kernel_shape=[2], strides=[0]), r"strides must be 1 or more; got \["),
    ],
)
def test_a_node_without_meaning_is_named_before_anything_runs(
    wrong: onnx.NodeProto, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        executor_of(wrong)


def test_all_that_is_wrong_is_said_at_once() -> None:
    wrong = [node("AscendQuant", "x", output=f"y{n}", offset=0.5, scale=0.0) for n in range(3)]
    with pytest.raises(ValueError, match="cannot be run so") as error:
        executor_of(*wrong, node("Relu", "x"))
    assert str(error.value).count("the_AscendQuant") == 6


@pytest.mark.parametrize(("count", "fits"), [(3, True), (2**62, False), (None, False)])
def test_a_loop_is_run_so_many_times_and_no_more(count: int | None, fits: bool) -> None:
    kinds = (("i", TensorProto.INT64), ("goes_on", TensorProto.BOOL), ("sum", TensorProto.FLOAT))
    inputs = [helper.make_tensor_value_info(n, kind, None) for n, kind in kinds]
    outputs = [
        helper.make_tensor_value_info("still", TensorProto.BOOL, None),
        helper.make_tensor_value_info("more", TensorProto.FLOAT, None),
    ]
    steps = [
        helper.make_node("Identity", ["goes_on"], ["still"]),
        helper.make_node("Add", ["sum", "sum"], ["more"]),
    ]
    body = helper.make_graph(steps, "body", inputs, outputs)
    given = "" if count is None else "count"
    constants = {} if count is None else {"count": np.asarray(count, dtype=np.int64)}
    loop = executor_of(node("Loop", given, "", "x", body=body), **constants)
    if fits:
        np.testing.assert_array_equal(loop.run({"x": f32([1, 2])})[0], [8, 16])
    else:
        with pytest.raises(ValueError, match="repeats its body more than 20000 times"):
            loop.run({"x": f32([1, 2])})


def test_an_output_without_a_name_is_read_by_no_input_without_one() -> None:
    split = helper.make_node("Split", ["x"], ["", "right"], name="split", axis=0)
    clip = helper.make_node("Clip", ["right", "", "most"], ["y"], name="clip")
    model = executor_of(split, clip, most=f32(9))
    np.testing.assert_array_equal(model.run({"x": f32([5, 1])})[0], [1])


def test_shapes_that_do_not_fit_name_the_node_and_what_it_reads() -> None:
    add = executor_of(node("Add", "x", "c"), c=f32([1, 2, 3]))
    with pytest.raises(
        ValueError, match=r"'the_Add' \(Add\) cannot be .*float32 \[2\], float32 \[3"
    ):
        add.run({"x": f32([1, 2])})
    quant = node("AscendQuant", "x", output="q", **QUANT)
    layer = node("MatMul", "q", "w", output="a")
    product = executor_of(quant, layer, node("Cast", "a", to=1), w=np.ones((3, 2), np.int8))
    with pytest.raises(ValueError, match=r"'the_MatMul' \(MatMul\) cannot be computed from int8"):
        product.run({"x": f32([[1, 2, 3, 4, 5]])})


HUGE = np.array([2**20, 2**20])


@pytest.mark.parametrize(
    ("large", "constants"),
    [
        (node("Expand", "x", "n"), {"n": HUGE}),
        (node("ConstantOfShape", "n"), {"n": HUGE}),
        (node("Tile", "x", "n"), {"n": HUGE}),
        (node("Pad", "x", "n"), {"n": np.array([0, 0, 2**20, 2**20])}),
        (node("Resize", "x", "e", "f"), {"e": f32([]), "f": f32([2**20, 2**20])}),
        (node("Add", "x", "c"), {"c": np.zeros((2**11, 1), np.float32)}),
        (node("GatherND", "x", "i"), {"i": np.zeros((2**11, 1), np.int64)}),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else "",
)
def test_what_would_be_too_large_is_refused_before_it_is_made(
    large: onnx.NodeProto, constants: dict[str, Array]
) -> None:
    executor = executor_of(large, **constants)
    x = np.zeros((1, 2**11 if large.op_type in ("Add", "GatherND") else 1), np.float32)
    with pytest.raises(ValueError, match=rf"at most 1048576 bytes; 'the_{large.op_type}' "):
        executor.run({"x": x})


def test_windows_and_paddings_count_where_the_result_is_small() -> None:
    pool = node("MaxPool", "x", kernel_shape=[2], pads=[0, 2**40], strides=[2**40])
    with pytest.raises(ValueError, match=r"'the_MaxPool' .* the padded data would take"):
        executor_of(pool).run({"x": np.zeros((1, 1, 4), np.float32)})


def test_doubling_again_and_again_ends_at_the_limit() -> None:
    names = ["x", *(f"x{n}" for n in range(60)), "y"]
    nodes = [node("Concat", a, a, output=b, axis=0) for a, b in pairwise(names)]
    with pytest.raises(ValueError, match="All tensors may take at most"):
        executor_of(*nodes).run({"x": f32([1])})


def test_what_is_read_for_the_last_time_takes_no_memory_any_more() -> None:
    names = ["x", *(f"x{n}" for n in range(20)), "y"]
    nodes = [node("Relu", a, output=b) for a, b in pairwise(names)]
    x = np.ones(2**16, np.float32)
    (result,) = executor_of(*nodes, limit=4 * x.nbytes).run({"x": x})
    np.testing.assert_array_equal(result, x)


@pytest.mark.parametrize(("given", "expected"), [(3.0, 6.0), (-3.0, 3.0)])
def test_branches_are_computed_and_may_read_what_is_outside(given: float, expected: float) -> None:
    def branch(name: str, op_type: str, *inputs: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        made = node(op_type, *inputs, output=f"{name}_y")
        return helper.make_graph([made], name, [], [output])

    positive = node("Greater", "x", "zero", output="positive")
    branches = {
        "then_branch": branch("a", "Add", "x", "x"),
        "else_branch": branch("b", "Neg", "x"),
    }
    choice = node("If", "positive", **branches)
    executor = executor_of(positive, choice, zero=f32(0.0))
    assert executor.run({"x": f32(given)})[0] == expected


def test_inputs_of_another_type_or_shape_are_refused_all_at_once() -> None:
    model = model_of([node("Add", "x", "z")], {}, inputs=("x", "z"))
    for value in model.graph.input:
        value.type.tensor_type.shape.dim.add().dim_value = 2
    with pytest.raises(ValueError, match="inputs must be the model's") as error:
        AscendExecutor(model).run({"x": np.zeros(2), "z": f32([1, 2, 3])})
    assert "'x' must be float32 [2]; got float64 [2]" in str(error.value)
    assert "'z' must be float32 [2]; got float32 [3]" in str(error.value)


def test_an_input_of_no_known_type_is_refused() -> None:
    model = model_of([node("Relu", "x")], {})
    model.graph.input[0].type.tensor_type.elem_type = 128
    with pytest.raises(ValueError, match="input 'x' must have a type of ONNX; got the number 128"):
        AscendExecutor(model)
