"""A torch without one of the private parts: import works, and what is lost is said or harmless."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

import lightning_qat
from lightning_qat import prepare
from lightning_qat.model import torch_compile, torch_private
from tests.interpreters import answers

REMOVALS = (
    "del torch._C._autograd._top_saved_tensors_default_hooks",
    "del torch.utils.checkpoint._checkpoint_without_reentrant_generator",
    "del torch._C.DisableTorchFunction",
    "del torch._C._dynamo.eval_frame.set_code_exec_strategy",
    "del torch._C._dynamo.eval_frame._FrameExecStrategy",
)


@functools.cache
def imported_without() -> dict[str, str]:
    """What importing all names prints after each removal; the callback's module is Lightning's."""
    names = ", ".join(name for name in lightning_qat.__all__ if name != "QATCallback")
    code = f"from lightning_qat import {names}\nimport lightning_qat.layers\nprint('imported')"
    first = "import torch._dynamo.eval_frame, torch.utils.checkpoint"
    told = answers(first, [f"{removal}\n{code}" for removal in REMOVALS])
    return dict(zip(REMOVALS, told, strict=True))


@pytest.mark.xdist_group("torch without private parts")
@pytest.mark.parametrize("removal", REMOVALS)
def test_the_package_imports_on_a_torch_without_a_private_part(removal: str) -> None:
    assert imported_without()[removal] == "imported\n"


def test_without_hooks_on_saved_tensors_relu_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not torch_private.saved_tensors_are_hooked()
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    assert torch_private.saved_tensors_are_hooked()


def test_without_hooks_on_saved_tensors_every_reader_quantizes_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert torch_private.autograd_context() == torch_private.autograd_context()
    with torch.no_grad():
        without = torch_private.autograd_context()
    assert without != torch_private.autograd_context()
    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    assert torch_private.autograd_context() != torch_private.autograd_context()


def test_checkpointed_functions_are_wrapped_once() -> None:
    calls: list[str] = []

    def wrap(function: Any) -> Any:
        calls.append("wrapped")
        return function

    prepare(nn.Sequential(nn.Linear(2, 2)), {"joins": False, "outputs": False})
    torch_private.wrap_checkpointed_functions(wrap)
    x = torch.ones(1, requires_grad=True)
    for reentrant in (False, True):
        checkpoint.checkpoint(torch.sin, x, use_reentrant=reentrant).backward()
    assert calls == []
    assert x.grad is not None


def test_a_backward_pass_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda grad: seen.append(torch_private.is_in_backward()))
    (x * 2).backward()
    assert (seen, torch_private.is_in_backward()) == ([True], False)
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    (x * 2).backward()
    assert seen == [True, False]


def test_hooks_on_all_modules_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not torch_private.all_modules_are_hooked()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert torch_private.all_modules_are_hooked()
    monkeypatch.delattr(nn.modules.module, "_has_any_global_hook")
    assert not torch_private.all_modules_are_hooked()
    handle.remove()


def test_without_a_way_to_disable_modes_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "DisableTorchFunction")
    with pytest.raises(RuntimeError, match=r"torch\._C\.DisableTorchFunction"):
        torch_private.without_function_modes()


def test_torch_nn_functional_is_enough_for_the_function_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch._C, "_nn")
    assert torch_private.function_namespaces() == (torch, Tensor, F)


def test_this_torch_has_every_private_part() -> None:
    assert torch_compile.missing_parts() == []


@pytest.mark.parametrize(
    ("module", "name"),
    [(m, name) for m, names in torch_compile._NEEDED.items() for name in names],
)
def test_a_compiled_model_is_refused_where_a_private_part_is_missing(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    compiled: Any = torch.compile(model, backend="eager")
    part, _, last = name.rpartition(".")
    monkeypatch.setitem(
        torch_compile._NEEDED,  # type: ignore[arg-type]
        module,
        (f"{part}.gone_{last}".lstrip("."),),
    )
    message = rf"torch\.compile of torch .* lacks {module}.*gone_.*Train without torch\.compile"
    with pytest.raises(RuntimeError, match=message):
        prepare(compiled, "int8", torch.randn(2, 3))
    prepare(model, "int8", torch.randn(2, 3))


class GatesAfterABreak(nn.Module):
    """Calls functions that dynamo keeps back from function modes, behind a graph break too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardsigmoid(self.a(x))
        torch._dynamo.graph_break()
        return F.hardswish(F.pad(self.b(x), (1, 1)))


def test_compiling_leaves_dynamos_table_of_functions_as_it_was() -> None:
    from torch._dynamo.variables.torch import get_overridable_functions

    torch._dynamo.reset()
    before = set(get_overridable_functions())
    assert F.hardswish not in before
    model = GatesAfterABreak()
    x = torch.randn(2, 4)
    prepare(model, "int8", x)
    model.train()(x)
    expected = model.eval()(x)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
    assert get_overridable_functions() == before
    torch._dynamo.reset()
