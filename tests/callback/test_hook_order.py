"""The order of Lightning's calls that the callback relies on; fails when Lightning changes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.callback.tiny import Net, loader, qat


def test_the_order_of_hooks_around_a_resumed_fit(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    run = trainer()
    run.fit(Net(), loader())
    run.save_checkpoint(tmp_path / "two.ckpt")
    seen: list[str] = []

    class Module(Net):
        def setup(self, stage: str) -> None:
            seen.append(f"module.setup {stage == 'fit'}")

        def configure_model(self) -> None:
            seen.append("module.configure_model")

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.append("module.on_load_checkpoint")

        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            seen.append("module.load_state_dict")
            return super().load_state_dict(*args, **kwargs)

        def configure_optimizers(self) -> Any:
            seen.append("module.configure_optimizers")
            return super().configure_optimizers()

    class Watch(L.Callback):
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            if name in HOOKS:

                def told(*args: Any, **kwargs: Any) -> Any:
                    seen.append(name)
                    return found(*args, **kwargs)

                return told
            return found

        def state_dict(self) -> dict[str, Any]:
            return {"some": 1}

    callback = Watch()
    run = trainer(callback, max_epochs=3, limit_train_batches=1, num_sanity_val_steps=1)
    run.fit(Module(), loader(), loader(), ckpt_path=tmp_path / "two.ckpt")
    once = [name for i, name in enumerate(seen) if name not in seen[:i]]
    assert once == [
        "setup",
        "module.setup True",
        "module.configure_model",
        "module.on_load_checkpoint",
        "module.load_state_dict",
        "on_load_checkpoint",
        "module.configure_optimizers",
        "on_fit_start",
        "on_sanity_check_start",
        "on_validation_start",
        "on_validation_end",
        "on_sanity_check_end",
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_train_end",
        "on_fit_end",
        "teardown",
    ]


HOOKS = {
    "setup",
    "on_load_checkpoint",
    "on_fit_start",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
}
"""Where the callback does something, and what stands between."""


def test_a_checkpoint_callback_saves_after_the_ranges_are_committed(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    saved = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=3, save_top_k=-1)
    # Given first, it is called last all the same.
    trainer(saved, qat(), enable_checkpointing=True).fit(Net(), loader())
    state = torch.load(tmp_path / "saved" / "step=3.ckpt", weights_only=True)
    assert float(state["state_dict"]["conv.input_quantizer.batches"]) == 3
    assert state["callbacks"]["QATCallback"]["batches_seen"] == 3
