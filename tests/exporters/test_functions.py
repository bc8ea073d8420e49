"""Files compute every function between layers as the converted model does."""

from pathlib import Path

import pytest
import torch

from lightning_qat import convert, export, prepare, verify
from tests.function_cases import CASES, Many

NAMES = {
    "fake_quant_onnx": (
        *("prelu", "glu", "neg", "pow", "normalize", "cumsum", "grid_sample", "baddbmm"),
        *("einsum, a product", "einsum, of many axes", "max", "topk", "gather"),
    ),
    "cann": ("prelu", "abs", "selu", "std", "einsum, a product", "amin", "masked_fill with zero"),
}


@pytest.mark.parametrize("target", NAMES)
def test_a_file_computes_the_functions_of_the_converted_model(target: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 6, 6)
    model = Many([CASES[name].call for name in NAMES[target]])
    prepare(model, "int8", x)
    for _ in range(2):
        model.train()(x)
    quantized = convert(model, x)
    agreement = verify(quantized, export(quantized, target, tmp_path / "functions"))
    assert agreement.parameters_equal
    # Without optimizations, where there are any. A sum in another order may round the other way.
    assert agreement.max_steps <= 1.001
