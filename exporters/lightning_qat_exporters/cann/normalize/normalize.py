"""Bring QDQ models of any tool to the one form that ``find_quantized`` reads."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
import onnx_ir.passes.common as common

from lightning_qat_exporters.cann.normalize.dequantize_before_moves import DequantizeBeforeMoves
from lightning_qat_exporters.cann.normalize.explicit_pads import ExplicitPads
from lightning_qat_exporters.cann.normalize.fold_batchnorm import FoldBatchNorm
from lightning_qat_exporters.cann.normalize.fold_constants import FoldConstants
from lightning_qat_exporters.cann.normalize.inline_functions import InlineFunctions
from lightning_qat_exporters.cann.normalize.integer_sources import PairIntegerSources
from lightning_qat_exporters.cann.normalize.propagate_pairs import PropagatePairs
from lightning_qat_exporters.cann.normalize.recognise_grid_weights import RecogniseGridWeights
from lightning_qat_exporters.cann.normalize.split_asymmetric_weights import SplitAsymmetricWeights
from lightning_qat_exporters.cann.normalize.split_channel_scales import SplitChannelScales
from lightning_qat_exporters.onnx_files.boundary.memory import MemoryBudget


def with_plain_constants(model: ir.Model) -> ir.Model:
    """A copy with functions inlined, constants as initializers, and constant scales."""
    return _rewritten(model, (*_plain(), FoldConstants(qparams_only=True)))


def normalize(
    model: ir.Model, *, grid_weights: bool = False, budget: MemoryBudget | None = None
) -> ir.Model:
    """A copy that computes the same, with plain constants and a Q/DQ pair before every layer.

    What constants alone determine is computed, Identity removed, batch norms are folded into
    quantized layers, weights that leave int8 are split, and pairs repeated where only
    value-preserving operators stand between a pair and a layer.

    Args:
        model: A QDQ model of any tool.
        grid_weights: Take float weights that lie on a grid as integers.
        budget: What tensors computed of constants may take.
    """
    passes = (
        *_plain(),
        FoldConstants(budget=budget),
        common.IdentityEliminationPass(),
        DequantizeBeforeMoves(),
        PairIntegerSources(),
        SplitChannelScales(),
        *((RecogniseGridWeights(),) if grid_weights else ()),
        PropagatePairs(),
        SplitAsymmetricWeights(),
        FoldBatchNorm(),
        ExplicitPads(),
        common.RemoveUnusedNodesPass(),
    )
    return _rewritten(model, passes)


def _plain() -> tuple[ir.passes.InPlacePass, ...]:
    return (
        InlineFunctions(),
        common.RemoveInitializersFromInputsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    )


def _rewritten(model: ir.Model, passes: Iterable[ir.passes.InPlacePass]) -> ir.Model:
    copy = model.clone()
    for step in passes:
        step(copy)
    return copy
