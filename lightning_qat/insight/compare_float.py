"""Compare a quantized model with the float one, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_qat.export.compare.comparison import ComparedTensor, Comparison
from lightning_qat.export.compare.segments import segments
from lightning_qat.export.compare.tensor_errors import grid_use, tensor_errors
from lightning_qat.export.protocol import Array
from lightning_qat.insight.recorder import RecordedModel
from lightning_qat.insight.weights import float_weights, weight_rows
from lightning_qat.ir.quantize_calls import QuantizeCall, call_name
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.model.inputs import batch_of

_OWN_WEIGHTS = "the same model in float"


def compare_trained(
    model: nn.Module, other: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Comparison:
    """Compare a prepared model with its own float weights, or with those of a float model.

    Three runs: in float, quantized, and quantized with every tensor given as the float run has it,
    which shows the error that each layer adds by itself.

    Raises:
        ValueError: The model has no QAT layers, or the other one has other parameters.
    """
    recorded = RecordedModel.of(model)
    trained = {name: value.clone() for name, value in recorded.model.state_dict().items()}
    real: dict[str, Tensor] = {}
    rows: dict[str, ComparedTensor] = {}
    known: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def keep(name: str, x: Tensor) -> Tensor:
        if x.is_floating_point():
            real[name] = x.clone()
        # A tensor of its own, as a quantizer returns: the same calls find the same tensors.
        return x.clone()

    def accumulated(name: str, x: Tensor) -> Tensor:
        key = name.split("@")[0]
        quantized = recorded.quantize(key, x)
        if name in real and key in recorded.qparams:
            qparams = recorded.qparams[key]
            errors = tensor_errors(real[name].numpy(), quantized.numpy(), float(qparams.scale))
            use = grid_use(real[name].numpy(), qparams)
            rows[name] = ComparedTensor(name, "", errors, use=use)
        known[id(quantized)] = quantized
        return quantized

    def alone(name: str, x: Tensor) -> Tensor:
        row, key = rows.get(name), name.split("@")[0]
        if row is None:
            return recorded.quantize(key, x)
        quantized = recorded.quantize(key, x)
        scale = float(recorded.qparams[key].scale)
        own = tensor_errors(real[name].numpy(), quantized.numpy(), scale)
        rows[name] = ComparedTensor(name, "", row.total, own, row.use)
        return recorded.quantize(key, real[name])

    _take_weights(recorded.model, other)
    float_outputs = recorded.run(args, kwargs, keep, quantizing=False)
    real_weights = float_weights(recorded.model)
    recorded.model.load_state_dict(trained)
    outputs = recorded.run(args, kwargs, accumulated, quantizing=True)
    own_outputs = recorded.run(args, kwargs, alone, quantizing=True)
    return Comparison(
        _OWN_WEIGHTS if other is None else f"the float {type(other).__name__}",
        f"the quantized {type(model).__name__}",
        max(batch_of((args, kwargs)), 1),
        (*rows.values(), *_output_rows(float_outputs, outputs, own_outputs, known)),
        tuple(weight_rows(recorded.model, real_weights)),
    )


def compare_converted(
    model: QuantizedModel, other: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Comparison:
    """Compare a converted model with a float one: the inputs of layers, and the outputs.

    What other functions than layers read is not compared: a float model has no names for it.
    """
    real: dict[str, Array] = {}
    calls: Counter[str] = Counter()

    def keep(path: str, given: tuple[Any, ...]) -> None:
        key = f"{path}.input" if path else "input"
        if given and isinstance(given[0], Tensor):
            real[call_name(key, calls[key])] = given[0].detach().cpu().numpy()
            calls[key] += 1

    paths = {layer.name for layer in model.layers}
    handles = [
        module.register_forward_pre_hook(lambda _module, given, path=name: keep(path, given))
        for name, module in other.named_modules()
        if name in paths
    ]
    training = other.training
    try:
        with torch.no_grad():
            float_outputs = other.eval()(*args, **kwargs)
    finally:
        other.train(training)
        for handle in handles:
            handle.remove()
    made = segments(model)
    rows = []

    def watch(call: QuantizeCall, _before: Tensor, after: Tensor) -> None:
        qparams = model.tensors[call.key].qparams
        values = real.get(call.name)
        if values is None or values.shape != tuple(after.shape):
            return
        errors = tensor_errors(values, after.numpy(), float(qparams.scale))
        made_by = made[call.name].made_by
        rows.append(ComparedTensor(call.name, made_by, errors, use=grid_use(values, qparams)))

    outputs = model.watched(args, kwargs, watch)
    flat = [leaf for leaf in pytree.tree_leaves(float_outputs) if isinstance(leaf, Tensor)]
    rows += _output_rows(flat, list(outputs.values()))
    name = f"the float {type(other).__name__}"
    return Comparison(name, "the converted model", max(batch_of((args, kwargs)), 1), tuple(rows))


def _take_weights(model: nn.Module, other: nn.Module | None) -> None:
    """Load a float model's parameters and buffers into a prepared one."""
    if other is None:
        return
    known, state = model.state_dict(), other.state_dict()
    unknown = [name for name in state if name not in known]
    fitting = [n for n in state if n in known and state[n].shape == known[n].shape]
    if unknown or len(fitting) < len(state):
        wrong = [*unknown, *(n for n in state if n not in fitting and n not in unknown)]
        raise ValueError(
            "The float model must have the parameters of the quantized one; "
            f"{len(wrong)} are unknown or of another shape: {', '.join(wrong[:5])}. Give the model "
            "that training began with, or leave it out to compare with the trained float weights."
        )
    model.load_state_dict(state, strict=False)


def _output_rows(
    real: Any, outputs: Any, own: Any = None, known: Mapping[int, Tensor] | None = None
) -> Iterator[ComparedTensor]:
    """Outputs by their place, in 1/255 of their range; those that are ``known`` have rows."""
    flat = [
        [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
        for tree in (real, outputs, outputs if own is None else own)
    ]
    for number, (exact, values, by_itself) in enumerate(zip(*flat, strict=True)):
        if not exact.is_floating_point() or not exact.numel() or id(values) in (known or {}):
            continue
        step = float(exact.max() - exact.min()) / 255
        errors, alone = (
            tensor_errors(exact.float().numpy(), tensor.float().numpy(), step)
            for tensor in (values, by_itself)
        )
        yield ComparedTensor(f"output {number}", "", errors, None if own is None else alone)
