"""Bring QDQ models of any tool to the one form that ``find_quantized`` reads."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from lightning_qat_exporters.cann.normalize.fold_batchnorm import FoldBatchNorm
from lightning_qat_exporters.cann.normalize.propagate_pairs import CarryGrids
from lightning_qat_exporters.cann.normalize.split_asymmetric_weights import SplitWideWeights


def canonical(model: ir.Model) -> ir.Model:
    """A model that computes the same, with constants as initializers and every grid at its layer.

    Functions are inlined, Identity removed, batch norms folded into quantized layers, weights that
    leave int8 split, and grids repeated where a tensor is only moved between its pair and a layer.
    """
    same = model.clone()
    for step in (
        common.InlinePass(),
        common.RemoveInitializersFromInputsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.IdentityEliminationPass(),
        CarryGrids(),
        SplitWideWeights(),
        FoldBatchNorm(),
        common.RemoveUnusedNodesPass(),
    ):
        step(same)
    return same
