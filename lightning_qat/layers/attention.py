"""Multi-head attention: four quantized projections, and joins between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_qat.function_hooks.running import hide_from_all_modes
from lightning_qat.layers._layer import QATLayer
from lightning_qat.layers.linear import LinearQAT
from lightning_qat.model.module_input import as_module_input
from lightning_qat.numerics.int_repr import saving_int_repr
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import LayerSpec

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class ProjectionQAT(QATLayer):
    """The query's, the key's or the value's projection of an attention, whose rows it borrows.

    Its weight and bias are rows of the attention's own parameters, so it has none itself.
    """

    float_class = nn.Linear

    def __init__(self, attention: nn.MultiheadAttention, number: int, spec: LayerSpec) -> None:
        super().__init__()
        # Not as a submodule: the attention holds this one.
        self.__dict__["_attention"] = attention
        self.number = number
        self._add_quantizers(spec)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``(embed_dim, embed_dim)``, or ``kdim`` or ``vdim`` features of the input."""
        attention: Any = self.__dict__["_attention"]
        if attention.in_proj_weight is not None:
            return self._rows(attention.in_proj_weight)
        own = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        weight: Tensor = own[self.number]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """``(embed_dim,)``."""
        packed: Tensor | None = self.__dict__["_attention"].in_proj_bias
        return None if packed is None else self._rows(packed)

    def _rows(self, packed: Tensor) -> Tensor:
        size: int = self.__dict__["_attention"].embed_dim
        return packed[self.number * size : (self.number + 1) * size]

    def forward(self, input: Tensor) -> Tensor:
        """Multiply the fake-quantized input with the fake-quantized weight."""
        x: Tensor = self.input_quantizer(input, saves_input=True)
        weight: Tensor = self.weight_quantizer(as_module_input(self.weight))
        with saving_int_repr(x, weight):
            return functional.linear(x, weight, self.bias)


class OutputProjectionQAT(LinearQAT):
    """The output projection of an attention; torch has a Linear of its own there."""

    float_class = NonDynamicallyQuantizableLinear


class MultiheadAttentionQAT(nn.MultiheadAttention, QATLayer):
    r"""``nn.MultiheadAttention`` with quantized projections.

    With :math:`\hat\cdot` for what is quantized, :math:`d` features of a head and the mask
    :math:`M` (0 or :math:`-\infty`)

    .. math::
        q &= \hat W_q \hat x_q + b_q, \quad k = \hat W_k \hat x_k + b_k, \quad
        v = \hat W_v \hat x_v + b_v \\
        a &= \mathrm{softmax}(\hat q \hat k^T / \sqrt d + M) \\
        y &= \hat W_o \widehat{\hat a \hat v} + b_o

    The projections are ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``, each with an
    ``input_quantizer`` and a ``weight_quantizer``; where query, key and value are one tensor, a
    plan (``prepare``) quantizes it once. What is between the projections is quantized by the plan's
    joins: the operands of both products and, without a mask, the softmax's input. With a mask the
    softmax reads float, since :math:`-\infty` is on no grid. A query that may attend to nothing
    gets zeros, where torch gives zeros or NaN.

    Parameters are those of the float layer, packed or not. Arguments of ``forward`` and results are
    too, and its gradients; only nested tensors are refused. ``is_causal`` is a hint without a
    meaning of its own: the mask is what counts.

    Args:
        embed_dim: Features of the query and of the result.
        num_heads: Heads; a divisor of ``embed_dim``.
        dropout: Probability, on the attention weights; in training only.
        bias: Whether the projections add biases, in float until export.
        add_bias_kv: Add a learned position to keys and values.
        add_zero_attn: Add a position of zeros to keys and values.
        kdim: Features of the key; ``embed_dim`` by default.
        vdim: Features of the value; ``embed_dim`` by default.
        batch_first: Inputs and results are ``(batch, time, features)``.
        device: Where the parameters live.
        dtype: Only ``torch.float32``.
        config: A recipe, the name of a preset, a recipe file or a mapping; ``int8`` by default.

    Example:
        >>> attention = MultiheadAttentionQAT(4, 2, batch_first=True)
        >>> x = torch.zeros(3, 5, 4)
        >>> y, weights = attention(x, x, x)
        >>> y.shape, weights.shape
        (torch.Size([3, 5, 4]), torch.Size([3, 5, 5]))
    """

    float_class = nn.MultiheadAttention

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: Recipe | Mapping[str, Any] | str | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self._add_quantizers(self._spec(config))

    @classmethod
    def weight_names(cls, module: nn.Module) -> tuple[str, ...]:
        """None: its projections are layers of their own."""
        return ()

    def activation_quantizer_names(self) -> tuple[str, ...]:
        """None, as well."""
        return ()

    @classmethod
    def why_unsupported(cls, module: nn.Module) -> str | None:
        """Parameters that are computed by hooks or parametrizations."""
        projection: Any = module.out_proj
        if type(projection) is not NonDynamicallyQuantizableLinear:
            return f"its out_proj is {type(projection).__name__}, not torch's own"
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = {name: getattr(module, name) for name in names}
        for name, weight in {**weights, "out_proj.weight": projection.weight}.items():
            if not isinstance(weight, nn.Parameter | None):
                return f"its {name} is computed by a hook (weight_norm or spectral_norm)"
        return None

    @classmethod
    def _twin(cls, module: nn.Module) -> nn.Module:
        twin = super()._twin(module)
        if isinstance(twin, nn.MultiheadAttention):
            twin._modules["out_proj"] = super()._twin(twin.out_proj)
        return twin

    def _add_quantizers(self, spec: LayerSpec) -> None:
        for number, name in enumerate(_PROJECTIONS):
            self.add_module(name, ProjectionQAT(self, number, spec).train(self.training))
        OutputProjectionQAT.swap(self.out_proj, spec)

    def to_float(self) -> nn.Module:
        """A new float layer with the very parameters of this one, which stays as it is."""
        twin: Any = super().to_float()
        for name in _PROJECTIONS:
            delattr(twin, name)
        twin.out_proj = twin.out_proj.to_float()
        return twin  # type: ignore[no-any-return]

    def unswap(self) -> None:
        """As for every layer; its output projection as well."""
        for name in _PROJECTIONS:
            delattr(self, name)
        output: Any = self.out_proj
        output.unswap()
        super().unswap()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are those of ``nn.MultiheadAttention``.

        Args:
            query: ``(time, batch, embed_dim)``, with ``batch_first`` ``(batch, time, embed_dim)``,
                without a batch ``(time, embed_dim)``.
            key: The same with ``kdim`` features and a time of its own.
            value: The same with ``vdim`` features and the key's time.
            key_padding_mask: ``(batch, key time)`` or, without a batch, ``(key time,)``; True or
                negative infinity where a key is not attended to.
            need_weights: Return the attention weights as well.
            attn_mask: ``(time, key time)`` or ``(batch * num_heads, time, key time)``; as above.
            average_attn_weights: Return the mean of all heads' weights.
            is_causal: A hint that ``attn_mask`` is causal; the mask is used as it is.

        Returns:
            The result, formed as ``query``, and ``(batch, time, key time)`` weights, without the
            mean ``(batch, num_heads, time, key time)``, or None.

        Raises:
            ValueError: A shape does not fit, a tensor is nested, or ``is_causal`` comes without a
                mask.
        """
        self._check(query, key, value, attn_mask, is_causal)
        batched = query.dim() == 3
        inputs = zip(_PROJECTIONS, (query, key, value), strict=True)
        q, k, v = (self._modules[name](x) for name, x in inputs)  # type: ignore[misc]
        if self.bias_k is not None:
            k, v = self._with_bias(k, self.bias_k), self._with_bias(v, self.bias_v)
        q, k, v = (self._heads(x) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        scores = torch.matmul(q, k.transpose(-2, -1)) * math.sqrt(1.0 / self.head_dim)
        if attn_mask is None and key_padding_mask is None:
            weights = functional.softmax(scores, -1)
        else:
            with hide_from_all_modes():
                weights = _masked_softmax(scores, self._mask(scores, attn_mask, key_padding_mask))
        weights = functional.dropout(weights, self.dropout, self.training)
        y = torch.matmul(weights, v)
        if not batched:
            y = y.squeeze(0).transpose(0, 1)
        else:
            y = y.transpose(1, 2) if self.batch_first else y.permute(2, 0, 1, 3)
        y = self.out_proj(y.reshape(query.shape))
        if not need_weights:
            return y, None
        if average_attn_weights:
            weights = weights.mean(1)
        return y, weights if batched else weights.squeeze(0)

    def _heads(self, x: Tensor) -> Tensor:
        """``(batch, heads, time, features of a head)``."""
        x = x.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _with_bias(self, x: Tensor, bias: Any) -> Tensor:
        """One more position in time, the same in every sequence."""
        if x.dim() == 2:
            return torch.cat((x, bias[0]))
        time = 1 if self.batch_first else 0
        size = list(x.shape)
        size[time] = 1
        return torch.cat((x, bias.expand(size)), time)

    def _mask(
        self, scores: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> Tensor:
        """What is added to ``(batch, heads, time, key time)``, positions of our own included."""
        batch, _, _, keys = scores.shape
        total: Tensor | None = None
        for mask, padding in ((attn_mask, False), (key_padding_mask, True)):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = scores.new_zeros(mask.shape).masked_fill(mask, -math.inf)
            mask = functional.pad(mask, (0, keys - mask.shape[-1]))
            if padding:
                mask = mask.reshape(batch, 1, 1, keys)
            elif mask.dim() == 3:
                mask = mask.reshape(batch, self.num_heads, -1, keys)
            total = mask if total is None else total + mask
        assert total is not None
        return total

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "A quantized MultiheadAttention must get padded tensors; got a nested one. Pad it, "
                "and say where with key_padding_mask."
            )
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True is a hint about attn_mask, which must be given with it; see "
                "nn.Transformer.generate_square_subsequent_mask."
            )
        shapes = [tuple(x.shape) for x in (query, key, value)]
        features = (self.embed_dim, self.kdim, self.vdim)
        fits = query.dim() in (2, 3) and all(
            len(shape) == query.dim() and shape[-1] == size
            for shape, size in zip(shapes, features, strict=True)
        )
        if not fits or shapes[1][:-1] != shapes[2][:-1]:
            raise ValueError(
                "Query, key and value of MultiheadAttention must all have 2 or all 3 dimensions, "
                f"{features} features, and key and value one length; got the shapes {shapes}."
            )


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """The softmax of ``scores + mask`` over the last axis; zeros where all of it is masked."""
    nothing = (mask == -math.inf).all(-1, keepdim=True)
    weights = functional.softmax(scores + mask.masked_fill(nothing, 0.0), -1)
    return weights.masked_fill(nothing, 0.0)
