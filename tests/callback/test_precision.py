"""Ranges and files are float32 whatever the precision of the training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_qat import QATCallback
from lightning_qat.training.range_sync import activation_quantizers
from tests.callback.tiny import BATCHES, Net, Planned, followed, loader, qat, ranges, same

BF16 = torch.bfloat16


def fit(trainer: Callable[..., L.Trainer], net: Net, precision: Any, tmp_path: Path) -> QATCallback:
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out")
    trainer(callback, precision=precision).fit(net, loader())
    for quantizer in activation_quantizers(net).values():
        assert {b.dtype for b in quantizer.buffers()} == {torch.float32}
    return callback


@pytest.mark.parametrize(
    ("kind", "precision", "weights"),
    [
        (Net, "bf16-mixed", torch.float32),
        (Net, "bf16-true", BF16),
        (Planned, "bf16-true", BF16),
        (Net, "64-true", torch.float64),
    ],
)
def test_quantizers_stay_float32_and_the_file_agrees(
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    kind: type[Net],
    precision: Any,
    weights: torch.dtype,
) -> None:
    net = kind()
    callback = fit(trainer, net, precision, tmp_path)
    assert net.head.weight.dtype == weights
    agreement = callback.delivered[0].agreement
    assert agreement is not None
    assert agreement.parameters_equal
    assert agreement.max_steps < 1
    # The first range is the data's own, in the precision that the data had.
    low, high = ranges(net)[0]
    data = [x.to(BF16) if precision == "bf16-true" else x for x, _ in loader()] * 2
    expected = followed([(float(x.min()), float(x.max())) for x in data])
    assert (low, high) == pytest.approx(expected, rel=1e-6)


def test_layers_made_in_half_precision_are_refused(trainer: Callable[..., L.Trainer]) -> None:
    class Late(Net):
        def configure_model(self) -> None:
            self.head = nn.Linear(4, 3)

    # Lightning makes them in the precision of the run.
    with pytest.raises(ValueError, match=r"must be float32; got head.weight is bfloat16"):
        trainer(qat(), precision="bf16-true").fit(Late(), loader())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_in_bf16_resumes_to_the_bit(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    def net() -> Net:
        L.seed_everything(1, verbose=False)
        return Net()

    whole, resumed = net(), net()
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=BATCHES, save_top_k=-1)
    options: dict[str, Any] = {"max_epochs": 3, "precision": "bf16-true"}
    trainer(qat(), saved, enable_checkpointing=True, **options).fit(whole, loader())
    trainer(qat(), **options).fit(resumed, loader(), ckpt_path=tmp_path / f"step={BATCHES}.ckpt")
    assert resumed.losses == whole.losses[BATCHES:]
    assert same(resumed.state_dict(), whole.state_dict())


LEARNED = {"activation": {"quantizer": "learned"}, "weight": {"quantizer": "learned"}}


@pytest.mark.parametrize("recipe", ["int8", LEARNED], ids=["int8", "learned"])
@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "bf16-mixed"),
        pytest.param("gpu", "bf16-mixed", marks=pytest.mark.cuda),
        # It scales gradients, on CUDA only.
        pytest.param("gpu", "16-mixed", marks=pytest.mark.cuda),
    ],
)
def test_mixed_precision_trains_and_its_file_agrees(
    trainer: Callable[..., L.Trainer], tmp_path: Path, device: str, precision: Any, recipe: Any
) -> None:
    net = Planned()
    seen: set[torch.dtype] = set()
    net.head.register_forward_hook(lambda _module, _args, logits: seen.add(logits.dtype))
    callback = qat(recipe, exporters=["fake_quant_onnx"], export_dir=tmp_path / "out")
    run = trainer(callback, accelerator=device, devices=1, precision=precision, max_epochs=4)
    run.fit(net, loader())
    assert (torch.float16 if precision == "16-mixed" else BF16) in seen
    assert sum(net.losses[-BATCHES:]) < sum(net.losses[:BATCHES])
    for quantizer in activation_quantizers(net).values():
        assert {t.dtype for t in [*quantizer.buffers(), *quantizer.parameters()]} == {torch.float32}
    agreement = callback.delivered[0].agreement
    assert agreement is not None
    assert agreement.parameters_equal
    assert agreement.max_steps < 1
