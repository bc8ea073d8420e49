"""GatherElements, which ``onnx.reference`` computes from 32 elements at most."""

from __future__ import annotations

import numpy as np
from onnx.reference.op_run import OpRun

from lightning_qat_exporters.cann.executor.domain import DOMAIN, Array


class GatherElements(OpRun):
    """``out[i, j] = data[index[i, j], j]`` for axis 0, and so on; negative indices count back."""

    op_domain = DOMAIN

    def _run(
        self, data: Array, indices: Array, axis: int | None = None, label: str = ""
    ) -> tuple[Array]:
        axis = (axis or 0) % data.ndim
        # Along other axes the indices may be fewer than the data: the first of these are meant.
        sizes = [slice(None) if a == axis else slice(n) for a, n in enumerate(indices.shape)]
        return (np.take_along_axis(data[tuple(sizes)], indices, axis),)
