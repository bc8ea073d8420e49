"""Checks, before training starts, that a Trainer can train quantized layers.

They look at its strategy, precision, callbacks and learning rate, and at the module's wrappers and
the layers that it makes late.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat.callback.lightning_private import (
    UNSUPPORTED_STRATEGIES,
    configuration_error,
    is_fitting,
    loads_weights_after_wrapping,
)
from lightning_qat.checkpoint.contents import checkpoint_problem, is_quantized
from lightning_qat.checkpoint.shape import shape_problem
from lightning_qat.joins.apply import plan_of
from lightning_qat.layers import QATLayer
from lightning_qat.model.paths import ModelPaths
from lightning_qat.prepare.report import PrepareReport
from lightning_qat.prepare.swap import choose_layers
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.schedule import Schedule
from lightning_qat.torch_files.load import require_saved

try:
    from lightning.pytorch.callbacks import WeightAveraging
except ImportError:  # lightning < 2.6
    _COPIES_BUFFERS: tuple[type[Callback], ...] = ()
else:
    _COPIES_BUFFERS = (WeightAveraging,)
_AVERAGING: tuple[type[Callback], ...] = (StochasticWeightAveraging, *_COPIES_BUFFERS)

_REFUSED_PRECISION = ("BitsandbytesPrecision", "TransformerEnginePrecision")


def trainer_problems(
    trainer: Trainer,
    pl_module: LightningModule,
    callback: Callback,
    recipe: Recipe,
    schedule: Schedule,
    inputs_known: bool,
) -> list[str]:
    """Everything about the trainer that must be changed, one message each.

    Args:
        trainer: The trainer.
        pl_module: The module.
        callback: The QAT callback.
        recipe: Its recipe.
        schedule: Its schedule.
        inputs_known: Whether there are example inputs before training.
    """
    if type(trainer).__module__.startswith("pytorch_lightning"):
        return [
            "QATCallback belongs to the lightning package; got a Trainer of pytorch_lightning, "
            "whose classes are not the same. Import Trainer from lightning.pytorch."
        ]
    return [
        *_strategy_problems(trainer),
        *_precision_problems(trainer),
        *data_parallel_problems(pl_module),
        *_averaging_problems(trainer, pl_module, callback, recipe, schedule, inputs_known),
    ]


def _strategy_problems(trainer: Trainer) -> list[str]:
    strategy = trainer.strategy
    supported = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    supported &= not isinstance(strategy, UNSUPPORTED_STRATEGIES)
    # A plan and its quantizers come with the weights: too late for a wrapped model.
    if not supported or loads_weights_after_wrapping(strategy):
        return [
            "QATCallback supports single-device and DistributedDataParallel training only; got "
            f"{type(strategy).__name__}. Use Trainer(strategy='ddp')."
        ]
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
        rank_zero_warn(
            f"QATCallback has not been tried with {type(strategy).__name__}; it is treated as the "
            "strategy it is derived from."
        )
    return []


def _precision_problems(trainer: Trainer) -> list[str]:
    precision = type(trainer.precision_plugin).__name__
    if precision not in _REFUSED_PRECISION:
        return []
    return [
        f"The precision plugin {precision} replaces Linear layers, so QATCallback cannot quantize "
        "them. Use precision='32-true' or a mixed precision."
    ]


def data_parallel_problems(pl_module: nn.Module) -> list[str]:
    """One message per ``nn.DataParallel`` anywhere in the module."""
    return [
        f"{name or 'The module'} is wrapped in torch.nn.DataParallel: its replicas are discarded "
        "after each forward, and observed ranges with them. Remove the wrapper and use "
        "Trainer(strategy='ddp', devices=N)."
        for name, module in pl_module.named_modules()
        if isinstance(module, nn.DataParallel)
    ]


def check_checkpoint(
    trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any], recipe: Recipe
) -> None:
    """Refuse a checkpoint that does not fit, before torch lists hundreds of keys."""
    damaged = shape_problem(checkpoint)
    if damaged is not None:
        raise configuration_error(damaged)
    if not is_quantized(checkpoint["state_dict"]):
        if is_fitting(trainer):
            rank_zero_warn(
                "The checkpoint is of a float run, and fit(ckpt_path=...) goes on with its "
                "epochs, optimizer and learning rate. To fine-tune it, load its weights first: "
                f"{type(pl_module).__name__}.load_from_checkpoint(path), then fit without "
                "ckpt_path."
            )
        return
    problem = checkpoint_problem(checkpoint, pl_module, recipe, pl_module.strict_loading)
    if problem is not None:
        raise configuration_error(problem)


def require_readable(path: str | Path, weights_only: bool | None) -> None:
    """Say of a checkpoint that Lightning is about to read what is wrong with it, and what to pass.

    Args:
        path: Where it is; Lightning says what is wrong with one that is not on this machine.
        weights_only: As ``fit`` was given it; ``False``: it is trusted to hold objects.

    Raises:
        ValueError: It is cut off or damaged, or holds objects.
    """
    if Path(path).is_file():
        require_saved(path, None if weights_only is False else frozenset())


def late_layer_problems(pl_module: nn.Module, recipe: Recipe) -> list[str]:
    """A message if layers came too late to be swapped: they would train in float, silently."""
    plan = plan_of(pl_module)
    unreached = () if plan is None else plan.unreached
    chosen = choose_layers(ModelPaths.of(pl_module), recipe, check_patterns=False).swapped
    late = [layer for layer in chosen if layer.name not in unreached]
    if not late and any(isinstance(module, QATLayer) for module in pl_module.modules()):
        return []
    names = ", ".join(repr(layer.name) for layer in late) or "all of them"
    return [
        "Every layer that the recipe selects must exist when training is set up; these "
        f"were made or replaced later: {names}. Make layers in __init__, setup() or "
        "configure_model(), not in on_fit_start, on_train_start or a step."
    ]


def _averaging_problems(
    trainer: Trainer,
    pl_module: LightningModule,
    callback: Callback,
    recipe: Recipe,
    schedule: Schedule,
    inputs_known: bool,
) -> list[str]:
    """Callbacks that copy the model in ``setup`` and later pair its tensors with the copy's."""
    problems = []
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    own = callbacks.index(callback)
    for position, other in enumerate(callbacks):
        name = type(other).__name__
        if isinstance(other, _AVERAGING) and position < own:
            problems.append(
                f"{name} copies the model before QATCallback has quantized it. Put QATCallback "
                f"before {name} in the list of callbacks."
            )
        elif isinstance(other, _COPIES_BUFFERS) and not inputs_known:
            if recipe.joins or recipe.outputs:
                problems.append(
                    f"{name} copies the model before the first batch has shown which tensors to "
                    "quantize. Set example_input_array or pass QATCallback(example_inputs=...), or "
                    "use a recipe with joins=False and outputs=False."
                )
        elif isinstance(other, StochasticWeightAveraging):
            norms = any(isinstance(m, _BatchNorm) for m in pl_module.modules())
            if norms and schedule.freeze_batchnorm is not None:
                problems.append(
                    f"{name} resets the statistics of batch norm after the last epoch and collects "
                    "them anew, which frozen batch norms do not. Use "
                    "Schedule(freeze_batchnorm=None)."
                )
    return problems


def learning_rate_problem(trainer: Trainer, float_learning_rate: float) -> str | None:
    """A message when an optimizer starts far above what fine-tuning should start with.

    A hundredth of the float training's first learning rate is what Wu et al. recommend
    (arXiv:2004.09602); ten times that is taken for an oversight.
    """
    advised = 0.01 * float_learning_rate
    highest = max(
        (float(g["lr"]) for optimizer in trainer.optimizers for g in optimizer.param_groups),
        default=0.0,
    )
    if highest <= 10 * advised:
        return None
    return (
        f"Quantized fine-tuning should start with about 1 % of the float training's learning rate, "
        f"{advised:g}; got {highest:g}. Lower it and anneal it to 0 over about a tenth of the "
        "original epochs (examples/fine_tune.py), or drop float_learning_rate."
    )


def eval_mode_problem(pl_module: LightningModule) -> str | None:
    """A message when every layer with parameters is in eval mode; ``None``: at least one is not."""
    layers = [
        module
        for module in pl_module.modules()
        if not isinstance(module, Quantizer) and any(True for _ in module.parameters(recurse=False))
    ]
    if not layers or any(layer.training for layer in layers):
        return None
    return (
        f"Every layer of {type(pl_module).__name__} is in eval mode, and Lightning (from 2.2 on) "
        "trains a module in the mode that it has when fit starts: dropout does nothing, and batch "
        "norm keeps its statistics. Ranges follow the training batches all the same. If that is "
        "not meant, call model.train() before trainer.fit."
    )


def bystander_hints(pl_module: LightningModule, report: PrepareReport, recipe: Recipe) -> list[str]:
    """One hint for each part that is quantized though it is perhaps no part of the network.

    Teachers, averaged copies and discriminators look like this: a LightningModule in the module, or
    a part in eval mode of which nothing trains. Where there is a plan, or the first batch will make
    one, it shows what ``forward`` runs, and nobody need be asked.
    """
    if report.joins is not None or recipe.joins or recipe.outputs:
        return []
    hints: dict[str, str] = {}
    for name, module in pl_module.named_modules():
        inside = any(name.startswith(f"{known}.") for known in hints)
        quantized = any(f"{layer.name}.".startswith(f"{name}.") for layer in report.swapped)
        if not name or inside or not quantized:
            continue
        frozen = not module.training and not any(p.requires_grad for p in module.parameters())
        if frozen or isinstance(module, LightningModule):
            what = "a LightningModule" if isinstance(module, LightningModule) else "frozen"
            hints[name] = (
                f"{name} ({type(module).__name__}, {what}) is quantized. If forward does not need "
                f"it, as a teacher or an averaged copy, leave it out: exclude: ['{name}*']."
            )
    return list(hints.values())
