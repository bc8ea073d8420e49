"""Run a file with another number of samples than the first: a dynamic batch must be one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_qat.export.protocol import Array, Artifact, Runnable, as_arrays
from lightning_qat.ir.quantized_model import QuantizedModel

_SIZES = (1, 2, 3)


@dataclass(frozen=True)
class OtherBatch:
    """The inputs of a model with another number of samples, and what the model makes of them.

    Args:
        samples: How many.
        inputs: By name.
        reference: Outputs by name.
    """

    samples: int
    inputs: Mapping[str, Array]
    reference: Mapping[str, Array]

    @classmethod
    def of(
        cls, model: QuantizedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> OtherBatch | None:
        """The samples of a call, cut or repeated; ``None`` where the model's batch is fixed."""
        inputs = model.flat_inputs(args, kwargs)
        axes = {
            id(inputs[name]): [axis for axis, size in enumerate(shape) if size == "batch"]
            for name, shape in model.input_shapes.items()
        }
        sizes = {t.shape[axis] for t in inputs.values() for axis in axes[id(t)]}
        for samples in _SIZES if len(sizes) == 1 else ():
            if samples in sizes:
                continue

            def resized(leaf: Tensor, samples: int = samples) -> Tensor:
                for axis in axes.get(id(leaf), ()):
                    leaf = leaf.index_select(axis, torch.arange(samples) % leaf.shape[axis])
                return leaf

            call: Any = pytree.tree_map_only(Tensor, resized, (args, dict(kwargs)))
            try:
                outputs = model(*call[0], **call[1])
            except ValueError:  # the model takes no such batch
                continue
            reference = as_arrays(model.flat_outputs(outputs))
            return cls(samples, as_arrays(model.flat_inputs(*call)), reference)
        return None

    def failure(self, target: Runnable, artifact: Artifact, runtime: str) -> str | None:
        """Why a file does not take it; ``None``: it gives outputs of the model's shapes."""
        try:
            outputs = target.run(artifact, runtime, self.inputs)
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        for name, expected in self.reference.items():
            if outputs[name].shape != expected.shape:
                return f"{name!r} has shape {outputs[name].shape} instead of {expected.shape}"
        return None
