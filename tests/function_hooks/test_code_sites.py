"""Calls are named by what they call and how often it was called before, never by lines."""

import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_qat.function_hooks.call_site import call_chain, is_by_line
from lightning_qat.function_hooks.code_sites import code_sites

if sys.version_info < (3, 11):
    pytest.skip("Python 3.10 tells no columns of calls", allow_module_level=True)


class Sites(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        site = call_chain()
        # This very function stands at the end of the chain.
        self.seen.append(site.rpartition(">__torch_function__")[0])
        return func(*args, **(kwargs or {}))


def made(source: str) -> Any:
    namespace: dict[str, Any] = {"__name__": "users_code"}
    exec(textwrap.dedent(source), namespace)
    return namespace["Net"]()


def sites(net: nn.Module) -> list[str]:
    x = torch.ones(2, 3)
    with Sites() as mode:
        net(x)
    return mode.seen


HEAD = """
import torch
from torch import nn

def gate(x):
    return x * torch.sigmoid(x)

class Net(nn.Module):
"""
PLAIN = (
    HEAD
    + """
    def forward(self, x):
        y = torch.cat([x, x], dim=1)
        z = torch.add(y, gate(y)).relu().add(y)
        z += gate(z)
        return (z + y) if self.training else (z - y)
"""
)
LAID_OUT = (
    HEAD.replace("def gate", "# A gate.\n\n\ndef gate")
    + """
    # A comment.

    def forward(self, x):
        # Another one.
        y = torch.cat(
            [x, x],
            dim=1,
        )

        z = (
            torch
            .add(
                y,
                gate(
                    y
                ),
            )
            .relu()
            .add(y)
        )
        print("debugging", end="")
        z += gate(z)  # twice
        return (
            (z + y)
            if self.training
            else (z - y)
        )
"""
)


def test_places_are_named_by_what_is_called_there() -> None:
    assert sites(made(PLAIN)) == [
        "@forward[cat#0]",
        "@forward[gate#0]>gate[sigmoid#0]",
        "@forward[gate#0]>gate[*#0]",
        "@forward[add#0]",
        "@forward[relu#0]",
        "@forward[add#1]",
        "@forward[gate#1]>gate[sigmoid#0]",
        "@forward[gate#1]>gate[*#0]",
        "@forward[+=#0]",
        "@forward[+#0]",
    ]


def test_layout_comments_and_calls_of_other_things_change_no_name() -> None:
    assert sites(made(LAID_OUT)) == sites(made(PLAIN))


def test_branches_are_other_places() -> None:
    assert sites(made(PLAIN).eval())[-1] == "@forward[-#0]"


def test_a_loop_is_one_place() -> None:
    net = made(
        HEAD
        + """
    def forward(self, x):
        for _ in range(2):
            x = x + x
        while x.sum() < 0:
            x = -x
        return x
"""
    )
    assert sites(net)[:2] == ["@forward[+#0]", "@forward[+#0]"]


def test_the_chain_ends_at_the_module_whose_forward_it_is() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made(PLAIN)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x)
            return result

    assert sites(Outer()) == sites(made(PLAIN))


@pytest.mark.parametrize(
    ("function", "called"),
    [
        (lambda f, x: f(x)(x), {"f": 2}),
        (lambda f, x: f.a.b(x), {"b": 1, "a": 0}),
        (lambda f, x: f(*x, **x), {"f": 1}),
        (lambda f, x: f(x if x else f(x)), {"f": 2}),
        (lambda f, x: x[0] + x[1] - f(x), {"+": 1, "-": 1, "f": 1}),
    ],
)
def test_what_is_called(function: Callable[..., Any], called: dict[str, int]) -> None:
    counts = code_sites(function.__code__).counts
    assert {name: counts.get(name, 0) for name in called} == called


@pytest.mark.parametrize(
    ("key", "old"),
    [
        ("add@forward+3:0", True),
        ("add@forward[+#0]:0", False),
        ("add@forward[+=#10]:0", False),
        ("silu:0", False),
        ("output:0", False),
    ],
)
def test_keys_of_earlier_versions_are_told_from_todays(key: str, old: bool) -> None:
    assert is_by_line(key) is old
