"""A checkpoint goes with code: layout may change, the calls may not."""

import sys
import textwrap
from typing import Any

import pytest
import torch

from lightning_qat import prepare
from lightning_qat.joins.apply import plan_of
from lightning_qat.training.range_sync import activation_quantizers

if sys.version_info < (3, 11):
    pytest.skip("Python 3.10 tells no columns of calls", allow_module_level=True)

HEAD = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
"""
PLAIN = """
    def forward(self, x):
        y = self.a(x) + x
        return torch.cat([self.b(y), y], 1) * 2
"""
LAID_OUT = """
    # Formatted anew, and commented.
    def forward(self, x):
        # The residual.
        y = (
            self.a(x)
            + x
        )

        print("x", end="")
        return (
            torch.cat(
                [self.b(y), y],
                1,
            )
            * 2
        )
"""
ONE_MORE = """
    def forward(self, x):
        x = x + x
        y = self.a(x) + x
        return torch.cat([self.b(y), y], 1) * 2
"""
ONE_LESS = """
    def forward(self, x):
        y = self.a(x)
        return torch.cat([self.b(y), y], 1) * 2
"""


def block(forward: str) -> Any:
    namespace: dict[str, Any] = {"__name__": "users_code"}
    exec(textwrap.dedent(HEAD + forward), namespace)
    return namespace["Block"]()


def trained() -> Any:
    model = block(PLAIN)
    prepare(model, "int8", torch.randn(2, 4))
    model(torch.randn(16, 4))
    return model


@pytest.mark.parametrize("planned", [True, False], ids=["example inputs", "loaded plan"])
def test_layout_and_other_calls_do_not_change_a_model(
    planned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model, again = trained(), block(LAID_OUT)
    prepare(again, "int8", torch.randn(2, 4) if planned else None)
    again.load_state_dict(model.state_dict())
    assert plan_of(again) == plan_of(model)
    x = torch.randn(16, 4)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert not torch.equal(again(x), block(LAID_OUT)(x))


@pytest.mark.parametrize(
    ("forward", "difference"),
    [
        (ONE_MORE, r"forward of 'Block' calls '\+' in 2 places, not in 1 \(1 new\)"),
        (ONE_LESS, r"forward of 'Block' calls '\+' in 0 places, not in 1 \(1 gone\)"),
    ],
    ids=["new", "gone"],
)
def test_other_code_is_refused_by_what_is_new_or_gone(forward: str, difference: str) -> None:
    state, again = trained().state_dict(), block(forward)
    prepare(again, "int8")
    with pytest.raises(RuntimeError, match=difference + ".*strip_quantizers"):
        again.load_state_dict(state)
    loosely = block(forward)
    prepare(loosely, "int8")
    assert len(loosely.load_state_dict(state, strict=False).unexpected_keys) == 1


def test_code_of_a_function_beside_the_module_counts_too() -> None:
    def net(product: str) -> Any:
        namespace: dict[str, Any] = {"__name__": "users_code"}
        gate = f"\ndef gate(x):\n    return {product}\n"
        forward = "\n    def forward(self, x):\n        return gate(self.a(x))\n"
        exec(HEAD + forward + gate, namespace)
        model = namespace["Block"]()
        prepare(model, "int8", torch.randn(2, 4))
        return model

    state = net("x * torch.sigmoid(x)").state_dict()
    with pytest.raises(RuntimeError, match=r"gate of 'Block' calls '\*' in 2 places, not in 1"):
        net("x * x * torch.sigmoid(x)").load_state_dict(state)


def test_a_plan_by_lines_of_an_earlier_version_is_still_followed() -> None:
    model = trained()
    plan = plan_of(model)
    assert plan is not None
    # As it was written: the line of the call within its function.
    lines = {"+": "add@forward+1:0", "cat": "cat@forward+2:0", "*": "mul@forward+2:0"}
    old = plan.to_dict()
    sites = {}
    for key, operands in old["sites"][""].items():
        called = key.partition("[")[2].partition("#")[0]
        sites["output:0" if key.startswith("output") else lines[called]] = operands
    old["sites"] = {"": sites}
    del old["code"], old["unreached"]
    state = model.state_dict()
    state["_qat_plan"] = old
    again = block(PLAIN)
    prepare(again, "int8")
    again.load_state_dict(state)
    x = torch.randn(16, 4)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert len(activation_quantizers(again)) == len(activation_quantizers(model))
