"""Modules in a captured graph have the paths that they have in the model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.convert.module_paths import module_path
from lightning_qat.export.export import export
from lightning_qat.export.verify import verify
from lightning_qat.ir.exported_program import module_path as module_of
from lightning_qat.prepare.prepare import prepare


class SelfAttention(nn.Module):
    """Query, key and value read one tensor, so they share a quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-2, -1)
        return x + scores.softmax(-1) @ self.value(x)


class Encoder(nn.Module):
    """Runs slices of its layers, as most models of transformers do, and of a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SelfAttention() for _ in range(3))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            x = layer(x)
        for layer in self.layers[::-1][:1]:
            x = layer(x)
        return self.head[1:](self.head[:1](x))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("layers.2", "layers.2"),
        ("layers.slice(1, None, None).0.query", "layers.1.query"),
        ("layers.slice(None, None, -1).slice(None, 1, None).0", "layers.2"),
        ("layers.slice(-2, None, None)", "layers"),
        ("head.slice(1, None, None).2", "head.2"),
        ("head.slice(1, None, None).slice(0, 1, None).1", "head.1"),
    ],
)
def test_a_path_through_a_slice_is_the_path_in_the_model(path: str, expected: str) -> None:
    model = Encoder()
    assert module_path(model, path) == expected
    assert expected in dict(model.named_modules())


def test_layers_of_slices_have_their_names_in_graph_file_and_comparison(tmp_path: Path) -> None:
    model, x = Encoder(), torch.randn(2, 3, 4)
    prepare(model, "int8", example_inputs=x)
    model(x)
    quantized = convert(model.eval(), x)
    names = {module_of(node) for node in quantized.program.graph.nodes}
    assert names <= set(dict(model.named_modules()))
    assert {"layers.0.query", "layers.2.value", "head.0"} <= names
    agreement = verify(quantized, export(quantized, "fake_quant_onnx", tmp_path / "encoder"))
    assert agreement.parameters_equal
