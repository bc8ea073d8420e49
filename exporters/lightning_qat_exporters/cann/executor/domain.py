"""Names and limits that the executor's files share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DOMAIN = "lightning_qat.reference"
_INT32 = np.iinfo(np.int32)
_EXACT_IN_FLOAT32 = 2**24


def require(label: str, attribute: str, value: Any, known: Mapping[Any, Any]) -> None:
    """Raise ``ValueError`` unless an attribute of the node ``label`` has a known value."""
    if value not in known:
        raise ValueError(f"{attribute} of {label!r} must be one of {list(known)}; got {value!r}.")
