"""Which layers need their bits? Measure each, let a budget choose, train with the answer.

    python -m examples.mixed_precision

``sensitivity`` quantizes one layer at a time to 8, 4 and 2 bits and measures the accuracy;
``suggest`` finds bits for every layer that keep a budget in few bytes; its recipe goes into the
callback. What training then recovers comes on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from torch import nn

from examples.digits import Digits, DigitsNet, percent, predictions
from lightning_qat import BudgetNotMet, QATCallback, sensitivity, suggest


def train(net: L.LightningModule, data: Digits, epochs: int, *callbacks: L.Callback) -> None:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(net, data)


def main(
    epochs: int = 20,
    bits: Sequence[int] = (8, 4, 2),
    budget: float = 1.0,
    out: Path = Path("qat_export"),
) -> tuple[float, float]:
    """Accuracy in percent, of the float network and of the one in mixed precision."""
    L.seed_everything(0, verbose=False)
    data, net = Digits(), DigitsNet()
    train(net, data, epochs)
    # Choose on training images: the test images are for the last line.
    x, y = data.train_set.tensors

    def accuracy(model: nn.Module) -> float:
        return percent(predictions(model, x) == y)

    out.mkdir(parents=True, exist_ok=True)
    result = sensitivity(
        net,
        "int8",
        accuracy,
        bits=bits,
        example_inputs=x[:2],
        resume=out / "sensitivity.json",  # the same call after a crash goes on here
    )
    print(result)
    try:
        suggestion = suggest(result, budget, choices=bits, minimize="size", most_evaluations=32)
    except BudgetNotMet as unmet:
        print(unmet)
        suggestion = unmet.best
    print(suggestion)

    before = percent(predictions(net, data.test_x) == data.test_y)
    net.learning_rate = 1e-3
    qat = QATCallback(suggestion.recipe, exporters=["fake_quant_onnx"], export_dir=out)
    train(net.train(), data, max(epochs // 4, 1), qat)
    after = percent(predictions(net, data.test_x) == data.test_y)
    print(f"float {before:.2f} %, {suggestion.size:,} bytes of mixed precision {after:.2f} %")
    return before, after


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
