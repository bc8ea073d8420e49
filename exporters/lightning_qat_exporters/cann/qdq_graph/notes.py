"""What a reader of a deploy model should know of the numbers in it."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_qat_exporters.cann.qdq_graph.finer_biases import most_steps
from lightning_qat_exporters.cann.qdq_graph.types import QuantizedGraph

_FEW_STEPS = 32
"""A bias whose largest value has fewer steps loses more than one part in 64 of it."""


def coarse_biases(found: QuantizedGraph) -> Iterator[str]:
    """A note where rounding a bias to its accumulator's steps changes it much, as at 2 bits."""
    coarse = [layer.name for layer in found.layers if 0 < most_steps(layer) < _FEW_STEPS]
    if coarse:
        more = f" and {len(coarse) - 3} more" if len(coarse) > 3 else ""
        yield (
            f"{', '.join(coarse[:3])}{more}: the bias is rounded to integers of less than "
            f"{_FEW_STEPS}, for so coarse are the scales of input and weight. It was trained in "
            "float, unless the tool that trained it rounds biases: float_bias=True (--float-bias) "
            "keeps it so."
        )


def wide_activations(found: QuantizedGraph) -> Iterator[str]:
    """A note where activations are of 16 bits."""
    wide = [a.name for a in found.activations if a.dst_type == "INT16"]
    if wide:
        yield (
            f"{len(wide)} activations are of 16 bits ({', '.join(wide[:3])}"
            f"{', ...' if len(wide) > 3 else ''}). AMCT writes them, and CANN's parser reads them, "
            "but AscendQuant is registered for int8 and int4 alone in CANN's public sources, so "
            "ATC may refuse the model. Use 8 bits unless your product is known to take INT16."
        )
