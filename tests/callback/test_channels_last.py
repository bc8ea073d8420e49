"""Memory in channels_last: no quantizer lays it out anew, and files are the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.training.range_sync import activation_quantizers
from tests.callback.tiny import Net, loader, qat, ranges

DEVICES = ["cpu", pytest.param("gpu", marks=pytest.mark.cuda)]
LEARNED = {"activation": {"quantizer": "learned"}, "weight": {"quantizer": "learned"}}


class Residual(Net):
    """Convolutions, a depthwise one among them, an addition and a concatenation between them."""

    layout: Any = torch.contiguous_format

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.last = nn.Conv2d(8, 4, 1)
        self.example_input_array = torch.zeros(2, 1, 6, 6)
        self.laid_out: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.conv(x.to(memory_format=self.layout))))
        y = F.relu(self.depthwise(x) + x)
        y = self.last(torch.cat([x, y], 1))
        self.laid_out.append(y.is_contiguous(memory_format=self.layout))
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


class ChannelsLast(Residual):
    """The same with weights and inputs in channels_last."""

    layout = torch.channels_last


def note_layouts(net: Residual) -> None:
    """Note of every quantizer whether it returns four dimensions as it was given them."""

    def note(_: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        if args[0].dim() == 4:
            net.laid_out.append(result.stride() == args[0].stride())

    for quantizer in activation_quantizers(net).values():
        quantizer.register_forward_hook(note)


class Notes(L.Callback):
    """As soon as quantizers exist."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch:
            note_layouts(pl_module)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("recipe", "memory", "precision"),
    [
        ("int8", "fast", "32-true"),
        ("int8", "compact", "bf16-mixed"),
        (LEARNED, "fast", "bf16-mixed"),
    ],
)
def test_channels_last_trains_as_contiguous_memory_does(
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    recipe: Any,
    memory: Any,
    precision: Any,
    device: str,
) -> None:
    def fit(net: Residual, **options: Any) -> Any:
        callback = qat(recipe, memory=memory, **options)
        net.to(memory_format=net.layout)
        run = trainer(callback, Notes(), accelerator=device, devices=1, precision=precision)
        run.fit(net, loader())
        return callback

    last, contiguous = ChannelsLast(), Residual()
    contiguous.load_state_dict(last.state_dict())
    fit(contiguous)
    callback = fit(last, exporters=["fake_quant_onnx"], export_dir=tmp_path)
    agreement = callback.delivered[0].agreement
    assert agreement.parameters_equal
    assert agreement.max_steps < 1
    assert last.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(last.laid_out)
    assert len(last.laid_out) > 40
    # Kernels sum in another order, and a value near a tie is a step away.
    assert last.losses == pytest.approx(contiguous.losses, rel=0.02)
    assert ranges(last)[0] == pytest.approx(ranges(contiguous)[0], rel=1e-6)
