"""Constants of a graph that are not finite: no target computes anything of use with them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from lightning_qat.ir.exported_program import Constants

STATISTICS = ("running_mean", "running_var")
"""The statistics of batch norm, which are no parameters."""


def not_finite(program: ExportedProgram) -> list[str]:
    """What the graph reads that is not finite, as ``layer: its bias is not finite``.

    A buffer or a constant may be infinite, as masks are; NaN is refused everywhere. Of parameters
    and of batch norm's statistics infinity is refused, too.
    """
    constants, found = Constants(program), []
    kinds = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        name = constants.name(node)
        if name is None or not node.users:
            continue
        value = constants.value(node)
        if value is None or not _is_broken(value, name, kinds[node.name]):
            continue
        path, _, own = name.rpartition(".")
        found.append(f"{path or 'the model'}: its {own} is not finite")
    return found


def _is_broken(value: Tensor, name: str, kind: InputKind) -> bool:
    if not (value.is_floating_point() or value.is_complex()):
        return False
    strict = kind is InputKind.PARAMETER or name.endswith(STATISTICS)
    return not bool(torch.isfinite(value).all()) and (strict or bool(torch.isnan(value).any()))
