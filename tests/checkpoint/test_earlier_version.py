"""Files that an earlier version has written load, go on training and export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_qat import QuantizedModel, convert, export, load_qat_checkpoint, verify
from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter
from tests.earlier_version import FILES, Residual, loader, trainer


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(FILES / "expected.pt", weights_only=True)
    return found


def steps_apart(a: Tensor, b: Tensor, quantized: QuantizedModel) -> float:
    """The largest difference of two outputs in steps of the model's output."""
    (step,) = quantized.output_steps.values()
    return float((a - b).abs().max()) / step


def test_a_checkpoint_loads_with_the_numbers_it_was_saved_with(expected: dict[str, Tensor]) -> None:
    checkpoint: dict[str, Any] = torch.load(FILES / "residual.ckpt", weights_only=True)
    model = load_qat_checkpoint(Residual, FILES / "residual.ckpt")
    assert set(model.state_dict()) == set(checkpoint["state_dict"])
    # A sum of floats may be ordered otherwise on another CPU: at a tie that is one output step.
    close = torch.isclose(model.eval()(expected["x"]), expected["residual"], atol=1e-5)
    assert close.float().mean() > 0.9


def test_a_run_goes_on_from_it(expected: dict[str, Tensor], tmp_path: Path) -> None:
    module = Residual()
    run = trainer(tmp_path, epochs=4)
    run.fit(module, loader(), ckpt_path=FILES / "residual.ckpt", weights_only=True)
    assert run.global_step == 16
    quantized = convert(module, expected["x"])
    assert steps_apart(module.eval()(expected["x"]).detach(), expected["resumed"], quantized) <= 2


def test_a_converted_model_loads_and_exports(expected: dict[str, Tensor], tmp_path: Path) -> None:
    quantized = QuantizedModel.load(FILES / "recurrent.pt2")
    assert steps_apart(quantized(expected["steps"]), expected["recurrent"], quantized) <= 1
    for exporter in (FakeQuantOnnxExporter(), CannExporter()):
        agreement = verify(quantized, export(quantized, exporter, tmp_path / "recurrent"))
        assert agreement.parameters_equal
        assert agreement.max_steps <= 1
