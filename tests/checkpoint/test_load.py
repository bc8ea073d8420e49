"""Checkpoints of a QAT run, loaded where no callback is at hand."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_qat.checkpoint.load import load_qat_checkpoint
from lightning_qat.convert.convert import convert
from lightning_qat.layers import LinearQAT
from lightning_qat.recipe.recipe import Recipe
from tests.models import trained
from tests.tiny_module import TinyModule

RECIPE = Recipe(overrides={"head": {"weight": {"bits": 4}}, "features.0": None})


def checkpoint_of(module: pl.LightningModule, path: Path) -> Path:
    """What ``ModelCheckpoint(save_weights_only=True)`` writes."""
    torch.save(
        {
            "state_dict": module.state_dict(),
            "hyper_parameters": dict(module.hparams),
            "pytorch-lightning_version": pl.__version__,
        },
        path,
    )
    return path


def live() -> Any:
    return trained(TinyModule(width=6), torch.randn(4, 1, 8, 8), RECIPE)


@pytest.mark.parametrize("weights_only", [True, False])
def test_the_loaded_module_is_the_one_that_was_trained(tmp_path: Path, weights_only: bool) -> None:
    module, x = live(), torch.randn(4, 1, 8, 8)
    path = checkpoint_of(module, tmp_path / "last.ckpt")
    loaded = load_qat_checkpoint(TinyModule, path, weights_only=weights_only).eval()
    assert type(loaded) is TinyModule
    assert loaded.hparams["width"] == 6
    assert type(loaded.features[0]) is nn.Conv2d
    assert type(loaded.head) is LinearQAT
    assert torch.equal(loaded(x), module(x))
    tensors, expected = convert(loaded, x).tensors, convert(module, x).tensors
    assert tensors.keys() == expected.keys()
    assert all(tensors[key].qparams.equal(expected[key].qparams) for key in expected)


def test_a_loaded_module_goes_on_training(tmp_path: Path) -> None:
    loaded = load_qat_checkpoint(TinyModule, checkpoint_of(live(), tmp_path / "last.ckpt"))
    batch = (torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
    before = loaded.head.input_quantizer.batches.item()
    loaded.train()
    loss = nn.functional.cross_entropy(loaded(batch[0]), batch[1])
    loss.backward()
    assert loaded.head.weight.grad is not None
    assert loaded.head.input_quantizer.batches.item() == before + 1


def test_a_float_checkpoint_is_refused(tmp_path: Path) -> None:
    path = checkpoint_of(TinyModule(), tmp_path / "float.ckpt")
    with pytest.raises(ValueError, match="The state_dict holds no quantizers: it is of a float"):
        load_qat_checkpoint(TinyModule, path)


class Other(pl.LightningModule):
    def __init__(self, width: int = 4, lr: float = 0.1) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)


def test_the_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    path = checkpoint_of(live(), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"The checkpoint quantizes .*which Other does not have"):
        load_qat_checkpoint(Other, path)


def test_a_plain_module_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="load_qat_checkpoint takes a LightningModule class; got"):
        load_qat_checkpoint(nn.Linear, tmp_path / "any.ckpt")


# Lightning calls jsonargparse by names that are deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("cls", [TinyModule, pl.LightningModule])
def test_a_checkpoint_of_lightningcli_names_the_class_itself(
    tmp_path: Path, cls: type[pl.LightningModule]
) -> None:
    pytest.importorskip("jsonargparse")
    module, x = live(), torch.randn(4, 1, 8, 8)
    path = checkpoint_of(module, tmp_path / "last.ckpt")
    checkpoint = torch.load(path)
    # What it writes with subclass_mode_model=True.
    checkpoint["hyper_parameters"] = {
        "_class_path": f"{TinyModule.__module__}.TinyModule",
        "width": 6,
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
    }
    torch.save(checkpoint, path)
    loaded = load_qat_checkpoint(cls, path).eval()
    assert type(loaded) is TinyModule
    assert torch.equal(loaded(x), module(x))
    assert "on_load_checkpoint" not in vars(TinyModule)


def test_the_hook_of_a_module_is_its_own_again(tmp_path: Path) -> None:
    class Hooked(TinyModule):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.seen = checkpoint["hyper_parameters"]["width"]

    hook = Hooked.on_load_checkpoint
    loaded = load_qat_checkpoint(Hooked, checkpoint_of(live(), tmp_path / "last.ckpt"))
    assert loaded.seen == 6
    assert Hooked.on_load_checkpoint is hook


def test_objects_in_a_checkpoint_need_trust(tmp_path: Path) -> None:
    path = checkpoint_of(live(), tmp_path / "last.ckpt")
    torch.save({**torch.load(path), "loop": RECIPE}, path)
    with pytest.raises(ValueError, match=r"it holds .*Recipe.* pass weights_only=False"):
        load_qat_checkpoint(TinyModule, path)
    load_qat_checkpoint(TinyModule, path, weights_only=False)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02text", b"PK\x03\x04text"])
def test_a_file_of_another_format_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must be a whole checkpoint"):
        load_qat_checkpoint(TinyModule, path)
