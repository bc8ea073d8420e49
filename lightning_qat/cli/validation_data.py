"""Data modules that a command names, and what validation gives to a module's ``forward``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_qat.cli.module_class import LightningConfig, imported_class

if TYPE_CHECKING:
    from lightning_qat.callback.validation.validation import Validation


def data_module(named: str | None, config: LightningConfig | None) -> Any:
    """The data module of ``--datamodule``, or the configuration's; ``None``: neither names one.

    Raises:
        ValueError: It cannot be imported or made.
    """
    class_path = named or (config.data_class_path if config else None)
    if class_path is None:
        return None
    cls = imported_class(class_path, "--datamodule")
    arguments = config.data_arguments(cls) if config else {}
    try:
        return cls(**arguments)
    except Exception as error:  # the user's constructor
        raise ValueError(
            f"{cls.__name__} cannot be made: {type(error).__name__}: {error}. Arguments of its "
            "constructor are given by --config, under data."
        ) from error


def first_calls(
    validation: Validation, module: Any, limit: int | None
) -> tuple[list[Any], dict[str, float]]:
    """What ``forward`` takes, of the first validation batches, and what is logged of them.

    Where ``validation_step`` calls a part of the module and not the module itself, ``forward``
    takes a batch, or the first entry of one.

    Args:
        validation: Of the module.
        module: The module.
        limit: Most batches of each loader; never more than ``MOST_RECORDED``.

    Raises:
        ValueError: There are no batches, or ``forward`` takes neither.
    """
    from lightning_qat.calibrate.batches import (
        MOST_RECORDED,
        recorded_calls,
        run_batch,
    )
    from lightning_qat.model.inputs import Call

    calls: list[Any] = []
    most = min(limit or MOST_RECORDED, MOST_RECORDED)
    with recorded_calls(module, calls):
        batches, metrics = validation.batches(module, most)
    if calls:
        return calls, metrics
    name = type(module).__name__
    if not batches:
        raise ValueError(
            f"Validation of {name} must run at least one batch; its val_dataloader gives none."
        )
    pairs = all(isinstance(batch, list | tuple) and batch for batch in batches)
    calls = [Call((batch[0],), {}) if pairs else batch for batch in batches[:MOST_RECORDED]]
    try:
        run_batch(module, calls[0])
    except Exception as error:  # the user's forward runs
        raise ValueError(
            f"{name}.validation_step must call the module itself, self(x), to show what forward "
            "takes. It does not, and forward does not take the first entry of a batch: "
            f"{type(error).__name__}: {error}"
        ) from error
    return calls, metrics
