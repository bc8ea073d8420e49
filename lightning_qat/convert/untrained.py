"""A copy of a model that is not trained yet, with made-up numbers in the place of final ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_qat.convert.finalize import (
    detached_copy,
    finalize_model,
    refuse_broken_weights,
    tensor_keys,
)


def untrained_copy(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
    """As ``finalized_copy``, for a prepared model whose ranges may not be known yet.

    A quantizer without a range gets -1 to 1: wide enough that a bias fits 32 bits on its grid. The
    model itself is not changed.

    Args:
        model: The prepared model.
        args: What ``forward`` takes by position.
        kwargs: What it takes by keyword.
    """
    refuse_broken_weights(model)
    final = detached_copy(model)
    for quantizer in tensor_keys(final):
        if quantizer.why_not_final is not None:
            with torch.no_grad():
                quantizer.min_val.fill_(-1.0)
                quantizer.max_val.fill_(1.0)
            quantizer.range_changed()
            quantizer.calibrated = True
    return finalize_model(final, args, kwargs)
