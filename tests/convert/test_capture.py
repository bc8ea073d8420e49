"""The captured graph: dynamic batch, names of inputs and outputs, what cannot be captured."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.convert.capture import CaptureError
from lightning_qat.convert.convert import check_capture, convert
from lightning_qat.layers import QATLayer
from lightning_qat.model.inputs import as_call
from lightning_qat.prepare.prepare import prepare
from tests.convert.cases import same, snapshot
from tests.models import INPUTS_ONLY, NETWORKS, Nested, inputs_for, linear, trained


def tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


# Inputs and outputs


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_batch_dimension_is_dynamic_whatever_the_example(network: str, samples: int) -> None:
    model = trained(NETWORKS[network][0](), inputs_for(network))
    quantized = convert(model, inputs_for(network, samples))
    for size in (1, 2, 3, 7):
        x = inputs_for(network, size)
        assert quantized(x).shape == model(x).shape


def test_a_model_that_needs_its_batch_size_keeps_it() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.reshape(4, 3))

    model, x = Fixed(), torch.randn(4, 3)
    trained(model, x)
    assert torch.equal(convert(model, x)(x), model(x))
    one = torch.randn(1, 12)
    assert torch.equal(convert(model, one)(one), model(one))


def nested_inputs(samples: int = 4) -> dict[str, Tensor]:
    return {"left": torch.randn(samples, 6), "right": torch.randn(samples, 6) * 5}


@pytest.mark.parametrize("order", [("left", "right"), ("right", "left")])
def test_keyword_inputs_and_nested_outputs_keep_their_names(order: tuple[str, str]) -> None:
    values = nested_inputs()
    model = trained(Nested(), values)
    quantized = convert(model, {name: values[name] for name in order})
    assert set(quantized.input_names) == {"left", "right"}
    assert quantized.output_names == ("logits", "boxes_0", "boxes_1")
    found, expected = quantized(**values), model(**values)
    assert found.keys() == expected.keys()
    assert isinstance(found["boxes"], tuple)
    for a, b in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(quantized.flat_outputs(found)["boxes_1"], expected["boxes"][1])


@pytest.mark.parametrize("order", [("left", "right"), ("right", "left")])
def test_flat_inputs_go_by_name_whatever_the_order_of_the_keywords(order: tuple[str, str]) -> None:
    values = nested_inputs()
    quantized = convert(trained(Nested(), values), values)
    flat = quantized.flat_inputs((), {name: values[name] for name in order})
    assert torch.equal(flat["left"], values["left"])
    assert torch.equal(flat["right"], values["right"])


def test_positional_inputs_are_named_by_the_forward_s_arguments() -> None:
    values = tuple(nested_inputs().values())
    quantized = convert(trained(Nested(), values), values)
    assert quantized.input_names == ("left", "right")


def test_an_optional_input_may_be_none() -> None:
    values = {**nested_inputs(), "bonus": None}
    model = trained(Nested(), values)
    quantized = convert(model, values)
    assert quantized.input_names == ("left", "right")
    assert torch.equal(quantized(**values)["logits"], model(**values)["logits"])


class Pair(NamedTuple):
    mean: Tensor
    std: Tensor


@pytest.mark.parametrize(
    ("pack", "names"),
    [
        (lambda a, b: a, ("output",)),
        (lambda a, b: (a, b), ("output_0", "output_1")),
        (lambda a, b: [a, [b]], ("output_0", "output_1_0")),
        (lambda a, b: Pair(a, b), ("mean", "std")),
        (lambda a, b: {"a": a, "n": 3, "b": None, "c": b}, ("a", "c")),
    ],
)
def test_outputs_are_named_by_where_they_stand(
    pack: Callable[[Tensor, Tensor], Any], names: tuple[str, ...]
) -> None:
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            y = self.fc(x)
            return pack(y, y * 2)

    model, x = Packing(), torch.randn(4, 3)
    trained(model, x)
    quantized = convert(model, x)
    assert quantized.output_names == names
    assert torch.equal(tensors_of(quantized(x))[0], tensors_of(model(x))[0])


def test_no_two_outputs_share_a_name() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            y = self.fc(x)
            return {"a": [y, y * 2], "a_0": y * 3, "a_0_1": y * 4, "a_1": y * 5}

    x = torch.randn(4, 3)
    assert len(set(convert(trained(Clash(), x), x).output_names)) == 5


def test_an_input_and_an_output_never_share_a_name() -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": self.fc(x)}

    model, x = Echo(), torch.randn(4, 3)
    quantized = convert(trained(model, x), x)
    assert set(quantized.input_names).isdisjoint(quantized.output_names)


@pytest.mark.parametrize("nothing", [(), {}, [3], {"flag": True}, None])
def test_inputs_hold_a_tensor(nothing: Any) -> None:
    with pytest.raises(ValueError, match="Inputs must hold at least one tensor"):
        as_call(nothing)


# Compiled modules


@pytest.mark.parametrize("where", ["root", "submodule", "layer", "both", "in place"])
def test_what_torch_compile_wrapped_is_unwrapped(where: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    x = torch.randn(3, 4)
    trained(model, x, INPUTS_ONLY)
    expected = model(x)
    live: Any = model
    if where in ("layer", "both"):
        model[1][1] = torch.compile(model[1][1], backend="eager")
    if where in ("submodule", "both"):
        model[1] = torch.compile(model[1], backend="eager")
    if where in ("root", "both"):
        live = torch.compile(model, backend="eager")
    if where == "in place":
        model.compile(backend="eager")
    quantized = convert(live, x)
    assert set(quantized.tensors) == {"0.input", "0.weight", "1.1.input", "1.1.weight"}
    assert torch.equal(quantized(x), expected)


class Branching(nn.Module):
    """Control flow that depends on the data, in a submodule."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            if y.sum() > 0:
                return y
            return -y

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("capture", [convert, check_capture])
def test_control_flow_on_data_is_named_with_module_and_line(capture: Callable[..., Any]) -> None:
    model, x = Branching(), torch.randn(2, 3)
    trained(model, x)
    with pytest.raises(
        CaptureError,
        match=r"could not capture Branching\.forward: it failed in module 'block' \(Inner\) "
        r"\(test_capture\.py, line \d+: if y\.sum\(\) > 0:\).*torch\.where",
    ):
        capture(model, x)


def test_inputs_that_do_not_fit_are_named_where_they_failed() -> None:
    x = inputs_for("linear")
    with pytest.raises(CaptureError, match=r"it failed in module '0' \(LinearQAT\)"):
        convert(trained(linear(), x), torch.randn(4, 7))


@pytest.mark.parametrize("network", NETWORKS)
def test_capture_can_be_checked_before_any_batch(network: str) -> None:
    model = NETWORKS[network][0]()
    prepare(model)
    before = snapshot(model)
    check_capture(model, inputs_for(network))
    assert same(snapshot(model), before)
    assert not any(
        m.input_quantizer.calibrated  # type: ignore[union-attr]
        for m in model.modules()
        if isinstance(m, QATLayer)
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_torchscript_is_refused_by_name() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scripted = nn.Linear(4, 4), torch.jit.script(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.scripted(self.layer(x))
            return result

    model, x = Mixed(), torch.randn(4, 4)
    prepare(model, "int8", x)
    model(x)
    with pytest.raises(CaptureError, match=r"does not look into TorchScript: 'scripted' is a"):
        convert(model, x)
    model.scripted = nn.ReLU()
    convert(model, x)
