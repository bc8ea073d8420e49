"""What of a Trainer's surroundings cannot train quantized layers, found before anything starts."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import (  # type: ignore[attr-defined] # XLA: not in __all__
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,  # pyright: ignore[reportPrivateImportUsage]
    XLAStrategy,  # pyright: ignore[reportPrivateImportUsage]
)
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

try:
    from lightning.pytorch.callbacks import WeightAveraging
except ImportError:  # lightning < 2.6
    _AVERAGING: tuple[type[Callback], ...] = (StochasticWeightAveraging,)
else:
    _AVERAGING = (StochasticWeightAveraging, WeightAveraging)

# DeepSpeed and XLA strategies subclass those that are supported, so they are named.
_REFUSED = (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
_REFUSED_PRECISION = ("BitsandbytesPrecision", "TransformerEnginePrecision")


def environment_problems(
    trainer: Trainer, pl_module: LightningModule, callback: Callback
) -> list[str]:
    """Everything about the trainer that must be changed, one message each."""
    if type(trainer).__module__.startswith("pytorch_lightning"):
        return [
            "QATCallback belongs to the lightning package; got a Trainer of pytorch_lightning, "
            "whose classes are not the same. Import Trainer from lightning.pytorch."
        ]
    problems = []
    strategy = trainer.strategy
    supported = isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
    if not supported or isinstance(strategy, _REFUSED):
        problems.append(
            "QATCallback supports single-device and DistributedDataParallel training only; got "
            f"{type(strategy).__name__}. Use Trainer(strategy='ddp')."
        )
    elif type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
        rank_zero_warn(
            f"QATCallback has not been tried with {type(strategy).__name__}; it is treated as the "
            "strategy it is derived from."
        )
    precision = type(trainer.precision_plugin).__name__
    if precision in _REFUSED_PRECISION:
        problems.append(
            f"The precision plugin {precision} replaces Linear layers, so QATCallback cannot "
            "quantize them. Use precision='32-true' or a mixed precision."
        )
    for name, module in pl_module.named_modules():
        if isinstance(module, nn.DataParallel):
            problems.append(
                f"{name or 'The module'} is wrapped in torch.nn.DataParallel: its replicas are "
                "discarded after each forward, and observed ranges with them. Remove the wrapper "
                "and use Trainer(strategy='ddp', devices=N)."
            )
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is callback:
            break
        if isinstance(other, _AVERAGING):
            problems.append(
                f"{type(other).__name__} copies the model before QATCallback has quantized it. "
                f"Put QATCallback before {type(other).__name__} in the list of callbacks."
            )
    return problems
