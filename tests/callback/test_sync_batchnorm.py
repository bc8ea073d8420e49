"""SyncBatchNorm: Lightning converts and reverts it around training."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn

from lightning_qat import convert
from lightning_qat.recipe.schedule import Phase
from lightning_qat.training.phases import apply_phase, release_batchnorms
from tests.callback.tiny import Planned, loader, qat


def test_what_lightning_leaves_of_sync_batch_norm_is_folded_as_batch_norm(
    trainer: Callable[..., L.Trainer],
) -> None:
    # After training a reverted batch norm is of a private class, not BatchNorm2d.
    net = Planned()
    trainer(qat()).fit(net, loader())
    x = torch.randn(5, 1, 6, 6)
    wanted = convert(net, x)
    plugin = TorchSyncBatchNorm()
    reverted = plugin.revert(plugin.apply(net))
    assert type(reverted.bn) is not nn.BatchNorm2d
    found = convert(reverted, x)
    assert found.tensors.keys() == wanted.tensors.keys()
    assert torch.equal(found(x), wanted(x))
    release_batchnorms(reverted)


@pytest.mark.parametrize("phase", ["quantize", "batchnorm_frozen"])
def test_phases_reach_converted_batch_norms(phase: str) -> None:
    net = TorchSyncBatchNorm().apply(Planned())
    frozen = phase == "batchnorm_frozen"
    apply_phase(net, Phase(phase, True, True, frozen))  # type: ignore[arg-type]
    assert ("_lightning_qat_hold" in vars(net.bn)) is frozen
    release_batchnorms(net)
    assert not net.bn._forward_pre_hooks


@pytest.mark.parametrize("when", ["before training", "of some layers"])
def test_sync_batch_norm_that_the_user_converts_trains_as_batch_norm_in_one_process(
    trainer: Callable[..., L.Trainer], tmp_path: Path, when: str
) -> None:
    # torch takes the ordinary kernel where there is nobody to synchronize with, also on a CPU.
    plain, synced = Planned(), Planned()
    synced.load_state_dict(plain.state_dict())
    if when == "before training":
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(synced)
    else:
        synced.bn = nn.SyncBatchNorm.convert_sync_batchnorm(synced.bn)
    assert type(synced.bn) is nn.SyncBatchNorm
    trainer(qat()).fit(plain, loader())
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path)
    trainer(callback).fit(synced, loader())
    assert synced.losses == plain.losses
    agreement = callback.delivered[0].agreement
    assert agreement is not None
    assert agreement.parameters_equal
    x = torch.randn(5, 1, 6, 6)
    assert torch.equal(convert(synced, x)(x), convert(plain, x)(x))


@pytest.mark.cuda(devices=2)
def test_sync_batch_norm_on_gpus(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import lightning as L\n"
        "from tests.callback.tiny import Net, loader, qat\n"
        "L.Trainer(max_epochs=2, accelerator='gpu', devices=2, sync_batchnorm=True, logger=False,\n"
        "          enable_checkpointing=False, callbacks=[qat(\n"
        "              exporters=['fake_quant_onnx'], export_dir='out')]).fit(Net(), loader())\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "out" / "net_qdq.onnx").is_file()
