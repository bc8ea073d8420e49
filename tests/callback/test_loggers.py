"""What a run says of its files: compared on what, in which runtime, and with which cautions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_qat.callback.example_inputs import verification_inputs
from lightning_qat.convert.convert import convert
from tests.callback.tiny import Net, Planned, loader, qat
from tests.models import trained


def test_files_are_compared_on_what_training_saw_and_every_runtime_is_logged(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out")
    logger = CSVLogger(tmp_path)
    # Its example inputs are two samples of zeros.
    trainer(callback, max_epochs=1, logger=logger).fit(Planned(), loader())
    agreement = callback.delivered[0].agreement
    assert agreement is not None
    assert (agreement.samples, agreement.cautions) == (8, ())
    assert "8 samples (inputs of the first training batch)" in str(agreement)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["input_shapes"] == {"x": ["batch", 1, 6, 6]}
    logged = Path(logger.log_dir, "metrics.csv").read_text()
    runtimes = "onnxruntime/max_steps", "onnxruntime_no_optimizations/max_steps", "max_steps"
    for name in runtimes:
        assert f"qat/fake_quant_onnx/{name}" in logged


def test_a_network_that_has_collapsed_is_warned_of(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Collapsed(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    net = Collapsed()
    nn.init.zeros_(net.head.weight)
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out")
    with pytest.warns(UserWarning, match="Output 'output' is the same for all 8 samples, so"):
        trainer(callback, max_epochs=1).fit(net, loader())


class Two(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = self.head(x) * scale
        return out


X, SCALE = torch.randn(4, 3), torch.rand(4, 1)


@pytest.mark.parametrize("example", [(X, SCALE), {"x": X, "scale": SCALE}], ids=["args", "kwargs"])
@pytest.mark.parametrize(
    "recorded", [(X[:3], SCALE[:3]), {"scale": SCALE[:3], "x": X[:3]}], ids=["args", "kwargs"]
)
def test_recorded_inputs_take_the_form_of_the_example(example: Any, recorded: Any) -> None:
    module = Two()
    model = convert(trained(module, example), example)
    found = verification_inputs(model, module, recorded)
    if isinstance(example, dict):
        assert isinstance(found, dict)
        assert torch.equal(found["x"], X[:3])
    else:
        assert isinstance(found, tuple)
        assert torch.equal(found[1], SCALE[:3])


def test_recorded_inputs_are_cut_to_a_fixed_batch_or_left_out() -> None:
    module, example = Two(), (X[:2], SCALE[:2])
    model = convert(trained(module, example), example, dynamic_batch=False)
    found = verification_inputs(model, module, (X, SCALE))
    assert isinstance(found, tuple)
    assert found[0].shape == (2, 3)
    assert verification_inputs(model, module, (X[:1], SCALE[:1])) is None
    assert verification_inputs(model, module, (torch.randn(4, 5), SCALE)) is None
    assert verification_inputs(model, module, (X,)) is None
    assert verification_inputs(model, module, None) is None
