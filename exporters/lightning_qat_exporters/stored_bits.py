"""What takes more bits in a file than it was trained with."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.numerics.qparams import IntegerGrid

_FEW = 4
"""From here down a smaller file is expected; 7 bits are trained for other reasons."""


def stored_in_bytes(
    model: QuantizedModel, *, packed: IntegerGrid | None = None, remedy: str = ""
) -> Iterator[str]:
    """Say, in one sentence, that weights and activations of few bits take 8 in the file.

    Args:
        model: The model.
        packed: The grid of weights that the file stores in as few bits.
        remedy: What stores weights of 4 bits in 4 bits; empty where nothing does.
    """
    bits: dict[str, set[int]] = {"weight": set(), "activation": set()}
    for tensor in model.tensors.values():
        grid = tensor.qparams.grid
        # Grids of fewer than 8 bits begin at minus a power of two.
        width = (-grid.qmin).bit_length()
        if width <= _FEW and not (tensor.kind == "weight" and grid == packed):
            bits[tensor.kind].add(width)
    found = [
        f"{kind}s of {' and '.join(map(str, sorted(widths)))} bits"
        for kind, widths in bits.items()
        if widths
    ]
    if found:
        packs = f" {remedy}" if remedy and _FEW in bits["weight"] else ""
        yield (
            f"{' and '.join(found)} take 8 bits in the file, which is no smaller and no faster "
            f"than with 8.{packs}"
        )
