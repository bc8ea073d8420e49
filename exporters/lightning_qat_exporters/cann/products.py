"""Which of Ascend's operators a product has, by CANN's public sources.

The tables "product support" of ``quant/*/README.md`` in ``hicann/ops-nn`` (e5c3fa9, August 2026),
and the registrations of operators beside them. Where those two disagree the stricter one counts.
"""

from __future__ import annotations

from collections.abc import Mapping

ANTI_QUANT = "AscendAntiQuant"

WITHOUT: Mapping[str, frozenset[str]] = {
    "Ascend310": frozenset({ANTI_QUANT}),
    "Ascend310B": frozenset({ANTI_QUANT}),
    "Ascend310P": frozenset({ANTI_QUANT}),
    "Ascend910": frozenset({ANTI_QUANT}),
    "Ascend910B": frozenset(),
    "Ascend910_93": frozenset(),
    "Ascend950": frozenset(),
}
"""The operators that a product lacks. Beginnings of ``--soc_version``, as ATC calls products:
310B is Atlas 200I/500 A2, 310P Atlas inference, 910 Atlas training, 910B Atlas A2, 910_93 A3."""

FLOAT_CONVOLUTIONS = frozenset({"Ascend950"})
"""Products whose table of types for Conv2D lists no int8 (``op_nn_proto_extend.h``)."""


def check_product(product: str | None) -> None:
    """Raise ``ValueError`` for a product that the table does not have."""
    if product is not None and product not in WITHOUT:
        raise ValueError(
            f"product must be one of {list(WITHOUT)}, the beginning of ATC's --soc_version; got "
            f"{product!r}. Leave it out to write what AMCT writes."
        )


def lacks(product: str | None, operator: str) -> bool:
    """Whether a product lacks an operator; no product is named: what AMCT writes is there."""
    return product is not None and operator in WITHOUT[product]
