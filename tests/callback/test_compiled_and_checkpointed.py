"""Submodules under torch.compile and activation checkpointing."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_qat import Recipe
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.training.range_sync import activation_quantizers
from tests.callback.tiny import BATCHES, Net, Planned, loader, qat, ranges

# torch's compiler makes an object that torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

LAYERS_ONLY = Recipe(joins=False, outputs=False)


class Compiled(Net):
    """Its convolution and batch norm are compiled before anything is swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(nn.Sequential(self.conv, self.bn), backend="eager")
        del self.conv, self.bn

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.body(x)).mean((2, 3)))
        return logits


def test_compiled_submodules_train_as_uncompiled_ones(trainer: Callable[..., L.Trainer]) -> None:
    def fit(kind: type[Net]) -> Net:
        L.seed_everything(1, verbose=False)
        net = kind()
        trainer(qat(LAYERS_ONLY)).fit(net, loader())
        return net

    compiled, plain = fit(Compiled), fit(Net)
    assert compiled.losses == plain.losses
    assert sorted(ranges(compiled)) == sorted(ranges(plain))


def test_a_compiled_submodule_resumes_and_is_exported(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    run = trainer(qat(LAYERS_ONLY))
    run.fit(Compiled(), loader())
    run.save_checkpoint(tmp_path / "compiled.ckpt")
    net = Compiled()
    callback = qat(LAYERS_ONLY, exporters=["fake_quant_onnx"], export_dir=tmp_path / "out")
    trainer(callback, max_epochs=3).fit(net, loader(), ckpt_path=tmp_path / "compiled.ckpt")
    assert callback.delivered[0].error is None
    names = QuantizedModel.load(tmp_path / "out" / "compiled.pt2").tensors
    assert "body.0.weight" in names


def test_a_compiled_module_trains(trainer: Callable[..., L.Trainer]) -> None:
    # Without self.log, which torch 2.13 cannot trace in Lightning 2.6.6.
    net = Net()
    net.training_step = types.MethodType(  # type: ignore[method-assign]
        lambda self, batch: F.cross_entropy(self(batch[0]), batch[1]), net
    )
    trainer(qat(LAYERS_ONLY)).fit(torch.compile(net, backend="eager"), loader())
    assert ranges(net)[0] != (0.0, 0.0)


class Checkpointed(Planned):
    """Runs its body again in backward instead of keeping what it computed."""

    def forward(self, x: Tensor) -> Tensor:
        body: Any = checkpoint(lambda x: F.relu(self.bn(self.conv(x))), x, use_reentrant=False)
        logits: Tensor = self.head(body.mean((2, 3)))
        return logits


def test_activation_checkpointing_changes_no_range_and_no_loss(
    trainer: Callable[..., L.Trainer],
) -> None:
    def fit(kind: type[Net]) -> Net:
        L.seed_everything(1, verbose=False)
        net = kind()
        net.bn.momentum = 0.0  # the second forward would update its statistics again
        trainer(qat(LAYERS_ONLY)).fit(net, loader())
        return net

    checkpointed, plain = fit(Checkpointed), fit(Planned)
    assert checkpointed.losses == plain.losses
    assert ranges(checkpointed) == ranges(plain)
    batches = [float(q.batches) for q in activation_quantizers(checkpointed).values()]
    assert batches == [2 * BATCHES] * len(batches)


class Stages(Net):
    """A ResNet's stage behind the relu of its stem, and a function with a join of its own."""

    reentrant: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True))

    def run(self, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        if self.reentrant is None:
            return function(*args)
        found: Any = checkpoint(function, *args, use_reentrant=self.reentrant)
        return found

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = self.run(self.stage, x)
        x = self.run(lambda x: torch.cat([x, self.stage(x)], 1)[:, ::2], x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("memory", ["fast", "compact"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_stage_behind_a_relu_trains_as_without_checkpointing(
    trainer: Callable[..., L.Trainer], reentrant: bool, memory: str
) -> None:
    def fit(reentrant: bool | None) -> Net:
        L.seed_everything(1, verbose=False)
        net = Stages()
        net.reentrant = reentrant
        trainer(qat(memory=memory)).fit(net, loader())
        return net

    checkpointed, plain = fit(reentrant), fit(None)
    assert checkpointed.losses == plain.losses
    assert ranges(checkpointed) == ranges(plain)


class Joined(Net):
    """Its own forward makes calls that are quantized; without self.log, as above."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        logits: Tensor = self.head((torch.cat([x, x], 3)[..., ::2] + x).mean((2, 3)))
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


@pytest.mark.parametrize("example_inputs", [None, torch.zeros(2, 1, 6, 6)])
def test_a_compiled_module_is_planned_trained_and_exported_as_it_is_uncompiled(
    trainer: Callable[..., L.Trainer], tmp_path: Path, example_inputs: Any
) -> None:
    def fit(compiled: bool) -> Joined:
        torch._dynamo.reset()
        L.seed_everything(1, verbose=False)
        net, exporters = Joined(), ["fake_quant_onnx"] if compiled else []
        callback = qat(exporters=exporters, export_dir=tmp_path, example_inputs=example_inputs)
        module: Any = torch.compile(net, backend="eager") if compiled else net
        trainer(callback).fit(module, loader())
        if compiled:
            assert callback.delivered[0].error is None
            assert callback.delivered[0].agreement.parameters_equal  # type: ignore[union-attr]
        return net

    compiled, plain = fit(True), fit(False)
    assert compiled.losses == plain.losses
    assert ranges(compiled) == ranges(plain)
    assert len(ranges(plain)) > 4


@pytest.mark.parametrize("recipe", ["int8", {"exclude": ["body.0"]}, {"exclude": ["body.*"]}])
@pytest.mark.parametrize("kind", ["script", "trace"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_left_alone_and_listed(
    trainer: Callable[..., L.Trainer], kind: str, recipe: Any
) -> None:
    class Scripted(Net):
        def __init__(self) -> None:
            super().__init__()
            body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
            x = torch.zeros(1, 4, 6, 6)
            self.body = torch.jit.script(body) if kind == "script" else torch.jit.trace(body, x)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.body(F.relu(self.conv(x))).mean((2, 3)))
            return logits

    net, callback = Scripted(), qat(recipe)
    trainer(callback).fit(net, loader())
    assert callback.report is not None
    skipped = {layer.name: layer.reason for layer in callback.report.skipped}
    assert "TorchScript" in skipped["body.0"]
    assert {layer.name for layer in callback.report.swapped} == {"conv", "head"}
    assert net.losses[-1] != net.losses[0]
