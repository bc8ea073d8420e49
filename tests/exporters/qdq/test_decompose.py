"""What torch.onnx replaces before it translates: as torch's own pass has it, traced alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.onnx._internal.exporter import _decomp, _fx_passes, _registration

from lightning_qat_exporters.qdq.decompose import decomposed
from lightning_qat_exporters.qdq.private_onnxscript import decomposing_in_place


class _Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x))


@pytest.fixture(scope="module")
def translations() -> tuple[dict[Any, Any], set[Any]]:
    registry = _registration.ONNXRegistry.from_torchlib(opset_version=20)
    known: set[Any] = set(_decomp.get_onnx_implemented_overloads(registry))
    return _decomp.create_onnx_friendly_decomposition_table(known), known


def _captured(function: Callable[[Tensor], Any]) -> tuple[ExportedProgram, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        net = _Of(function).eval()
        return torch.export.export(net, (x,), dynamic_shapes=({0: Dim.AUTO},), strict=False), x


def _targets(program: ExportedProgram) -> list[str]:
    return sorted(str(n.target) for n in program.graph.nodes if n.op == "call_function")


FUNCTIONS = {
    "an adaptive pool": lambda y: F.adaptive_avg_pool2d(y, 2),
    "a tensor of nothing": lambda y: torch.eye(8) + y,
    "several results": lambda y: torch.std_mean(y, dim=1),
    "an operator of composite operators": lambda y: y.to("cpu", torch.bool),
    "a size of the input": lambda y: y.new_full((y.shape[0], 3), 2.0) + y.mean((1, 2, 3))[:, None],
    "a write into a slice, which torch's own pass replaces": lambda y: y[:, :1].relu_() + y[:, :1],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_graph_computes_the_same_with_the_operators_that_torchs_own_pass_leaves(
    name: str, translations: tuple[dict[Any, Any], set[Any]]
) -> None:
    table, known = translations
    program, x = _captured(FUNCTIONS[name])
    expected, theirs = program.module()(x), program.run_decompositions(dict(table))
    ours = decomposed(program, table, known)
    assert _targets(ours) == _targets(theirs)
    assert not [n for n in ours.graph.nodes if n.target in table]
    torch.testing.assert_close(ours.module()(x), expected)
    torch.testing.assert_close(ours.module()(x), theirs.module()(x), rtol=0, atol=0)
    # Another batch: sizes are still those of the input.
    larger = torch.cat((x, x, x))
    torch.testing.assert_close(ours.module()(larger), theirs.module()(larger), rtol=0, atol=0)


def test_strides_of_a_picture_in_nhwc_are_left_out(
    translations: tuple[dict[Any, Any], set[Any]],
) -> None:
    table, known = translations
    program, x = _captured(
        lambda y: F.adaptive_avg_pool2d(y.contiguous(memory_format=torch.channels_last), 1)
    )
    expected = program.module()(x)
    ours = decomposed(program, table, known)
    assert "aten.as_strided" not in " ".join(_targets(ours))
    torch.testing.assert_close(ours.module()(x), expected, rtol=0, atol=0)


def test_what_torch_adds_in_place_is_added_to_a_new_tensor(
    translations: tuple[dict[Any, Any], set[Any]],
) -> None:
    # torch decomposes RMSNorm to pow, mean, add_, rsqrt and mul.
    table, known = translations
    program, x = _captured(lambda y: F.rms_norm(y, (8,)))
    expected = program.module()(x)
    ours = decomposed(program, table, known)
    assert _targets(ours) == [
        "aten.add.Scalar",
        "aten.conv2d.default",
        "aten.mean.dim",
        "aten.mul.Tensor",
        "aten.pow.Tensor_Scalar",
        "aten.rsqrt.default",
    ]
    torch.testing.assert_close(ours.module()(x), expected)


def test_only_what_must_be_replaced_is_traced(
    translations: tuple[dict[Any, Any], set[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, known = translations
    program, _ = _captured(lambda y: F.relu(y) + 1.0)
    monkeypatch.setattr(ExportedProgram, "run_decompositions", None)
    before = [n for n in program.graph.nodes if n.op == "call_function" and "conv" in n.name]
    after = decomposed(program, table, known)
    assert [n for n in after.graph.nodes if n.op == "call_function" and "conv" in n.name] == before


def test_torch_onnx_has_its_own_pass_again_afterwards() -> None:
    before = _fx_passes.decompose_with_registry
    with decomposing_in_place():
        assert _fx_passes.decompose_with_registry is not before
    assert _fx_passes.decompose_with_registry is before
