"""The recommended way from a float checkpoint to a quantized network: a short, gentle run.

    python -m examples.fine_tune

Fine-tune for about a tenth of the original epochs, starting with 1 % of the original learning rate
and annealing it to 0 (Wu et al., arXiv:2004.09602). The data and the network are those of
examples/digits.py; its optimizer anneals by a cosine already.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch

from examples.digits import Digits, DigitsNet, percent, predictions
from lightning_qat import QATCallback, Schedule

LEARNING_RATE = 3e-3


def main(epochs: int = 40, out: Path = Path("qat_export")) -> tuple[float, float]:
    """Accuracy in percent, of the float network and of the quantized one."""
    L.seed_everything(0, verbose=False)
    data = Digits()
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=out, logger=False)
    trainer.fit(DigitsNet(LEARNING_RATE), data)
    checkpoint = trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]

    # The float weights, another learning rate; nothing else of the float run.
    net = DigitsNet.load_from_checkpoint(checkpoint, learning_rate=0.01 * LEARNING_RATE)
    before = percent(predictions(net, data.test_x) == data.test_y)
    callback = QATCallback(
        "int8",
        schedule=Schedule(freeze_observers=0.5, freeze_batchnorm=0.75),
        exporters=["fake_quant_onnx"],
        export_dir=out,
        float_learning_rate=LEARNING_RATE,  # warns when ours were far above 1 % of it
    )
    fine_tuning = L.Trainer(
        max_epochs=max(epochs // 10, 1),
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
    )
    fine_tuning.fit(net.train(), data)
    after = percent(predictions(net, data.test_x) == data.test_y)
    print(f"float {before:.2f} %, int8 after {fine_tuning.max_epochs} epochs {after:.2f} %")
    return before, after


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
