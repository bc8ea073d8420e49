"""Embeddings: tables of quantized rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_qat.function_hooks.running import hide_from_all_modes
from lightning_qat.layers._layer import QATLayer
from lightning_qat.quantizers.torch_onnx_export import is_exporting_onnx
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.recipe.recipe import Recipe


class EmbeddingQAT(nn.Embedding, QATLayer):
    """``nn.Embedding`` with a fake-quantized table.

    One scale per row, or one for the table (``granularity="per_tensor"``). Its input is an index,
    so only the weight is quantized; what reads a row quantizes it once more, on its own grid. In a
    step that reads fewer rows than the table has, only those are quantized, unless scales are
    learned or one serves all. The
    gradient is straight-through to the rows that were read; that of ``padding_idx`` stays zero, and
    ``scale_grad_by_freq`` divides as ever. Other arguments are those of ``nn.Embedding``.

    Args:
        num_embeddings: Rows.
        embedding_dim: Values in a row.
        padding_idx: A row that gets no gradient.
        max_norm: Must be None: it rescales the float table within forward.
        norm_type: Without a meaning then.
        scale_grad_by_freq: Divide a row's gradient by how often the batch reads it.
        sparse: Must be False: rounding the table makes its gradient dense.
        device: Where the parameters live.
        dtype: Only ``torch.float32``.
        config: A recipe, the name of a preset, a recipe file or a mapping; ``int8`` by default.

    Raises:
        ValueError: ``max_norm`` or ``sparse`` is given.

    Example:
        >>> EmbeddingQAT(10, 4)(torch.tensor([[1, 2, 9]])).shape
        torch.Size([1, 3, 4])
    """

    float_class = nn.Embedding
    quantizes_input = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: Recipe | Mapping[str, Any] | str | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        reason = self.why_unsupported(self)
        if reason is not None:
            raise ValueError(f"EmbeddingQAT cannot be made: {reason}.")
        self._add_quantizers(self._spec(config))

    def activation_quantizer_names(self) -> tuple[str, ...]:
        """None: indices are no real numbers."""
        return ()

    @classmethod
    def why_unsupported(cls, module: nn.Module) -> str | None:
        """What would change the table in forward, or its gradient's form."""
        if module.max_norm is not None:
            return "max_norm rescales the float table within forward; it must be None"
        if module.sparse:
            return "sparse gradients become dense when the table is rounded; sparse must be False"
        return None

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the fake-quantized table: the shape of ``input``, then ``embedding_dim``."""
        alone = self._rows_alone(input)
        with hide_from_all_modes():
            rows = functional.embedding(
                input.flatten() if alone else input,
                self.weight if alone else self.weight_quantizer(self.weight),
                self.padding_idx,
                scale_grad_by_freq=self.scale_grad_by_freq,
            )
            if not alone:
                return rows
            return cast(Tensor, self.weight_quantizer(rows)).reshape(*input.shape, -1)

    def _rows_alone(self, input: Tensor) -> bool:
        """Whether the rows that are read can be quantized for less, and come out the same.

        A row whose scale follows its own values knows nothing of the others. A table that is kept
        for several forwards is quantized whole.
        """
        quantizer = self.weight_quantizer
        return (
            type(quantizer) is WeightQuantizer
            and quantizer.spec.granularity == "per_channel"
            and not quantizer.shared
            and not (quantizer.cache is not None and quantizer.cache.open)
            and not is_exporting_onnx()
            and 0 < input.numel() < self.num_embeddings
        )
