"""The solver on recorded events, without a model."""

from lightning_qat.joins.solver import (
    INPUT,
    Event,
    Operand,
    Producer,
    Recording,
    group_consumers,
    solve,
    with_known_range,
)
from lightning_qat.recipe.specs import ActivationSpec

X, Y, R, Z, OUT = ((number, 0) for number in range(5))


def layer(name: str) -> Operand:
    return Operand(name, INPUT, 0, 0)


def call(function: str, operand: int, line: int = 1) -> Operand:
    return Operand("", function, 0, operand, f"{function}@forward[{function}#{line}]:0")


RESIDUAL = Recording(
    events=[
        Event((layer("conv1"),), (X,)),
        Event((call("relu", 0),), (Y,), (R,), quantizes=False),
        Event((call("add", 0),), (R,)),
        Event((call("add", 1),), (X,)),
        Event((layer("conv2"),), (Z,)),
    ],
    producers={R: Producer("relu", not_negative=True), Z: Producer("add")},
    call_keys={"": {"relu@forward[relu#1]:0": None, "add@forward[add#1]:0": None}},
    owners={"": None},
)


def test_the_worked_example_of_the_solver() -> None:
    plan, consumers = solve(RESIDUAL, lambda _: ActivationSpec())
    assert [t.quantizer for t in plan.tensors] == [
        "conv1.input_quantizer",
        "qat_joins.add_0_0",
        "conv2.input_quantizer",
    ]
    assert plan.tensors[0].consumers == ("conv1", "add:0[1]")
    assert [t.spec.fixed_min for t in plan.tensors] == [None, True, None]
    assert plan.sites[""] == {
        "relu@forward[relu#1]:0": {},
        "add@forward[add#1]:0": {"0": "qat_joins.add_0_0", "1": "conv1.input_quantizer"},
    }
    assert plan.links == {}
    assert consumers["conv1.input_quantizer"] == [layer("conv1"), call("add", 1)]


def test_layers_that_read_one_tensor_are_linked_to_the_first_ones_quantizer() -> None:
    events = [Event((layer("a"),), (X,)), Event((layer("b"),), (X,))]
    plan = solve(Recording(events), lambda _: ActivationSpec()).plan
    assert [t.quantizer for t in plan.tensors] == ["a.input_quantizer"]
    assert plan.links == {"b": "a.input_quantizer"}


def test_a_concatenation_joins_its_inputs_and_its_output() -> None:
    operands = (call("cat", 0), call("cat", 0))
    events = [Event(operands, (X, Y), (Z,)), Event((layer("a"),), (Z,))]
    groups, tensors = group_consumers(events)
    assert set(groups.values()) == {0}
    assert tensors == {0: [X, Y]}


def test_what_inherits_a_scale_needs_no_quantizer_for_an_operator_that_keeps_values() -> None:
    events = [
        Event((layer("a"),), (X,)),
        Event((call("reshape", 0, 1),), (X,), (Y,), quantizes=False),
        Event((call("permute", 0, 2),), (Y,), (Z,), quantizes=False),
    ]
    assert [o.function for o in group_consumers(events)[0]] == [INPUT, "reshape"]


def test_an_upsampled_tensor_is_quantized_before_it_is_upsampled() -> None:
    events = [
        Event((call("interpolate", 0),), (X,), (Y,), quantizes=False),
        Event((layer("a"),), (Y,)),
    ]
    assert [o.function for o in group_consumers(events)[0]] == ["interpolate", INPUT]


def test_a_range_by_definition_holds_only_if_all_producers_have_it() -> None:
    sigmoid = Producer("sigmoid", (0.0, 255 / 256), not_negative=True)
    spec = ActivationSpec()
    assert with_known_range(spec, [sigmoid, sigmoid]).clip == (0.0, 255 / 256)
    mixed = with_known_range(spec, [sigmoid, Producer("relu", not_negative=True)])
    assert (mixed.clip, mixed.fixed_min) == (None, True)
    assert with_known_range(spec, [sigmoid, Producer("add")]) == spec
