"""Record what one forward does with tensors: no tracing, no rewriting; ``solver.py`` plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_qat.function_hooks.attention import (
    FUSED_ATTENTION,
    WEIGHTS,
    WEIGHTS_RANGE,
    attend,
    attention_arguments,
)
from lightning_qat.function_hooks.call_site import call_chain
from lightning_qat.function_hooks.forward_cache import Key, key_of
from lightning_qat.function_hooks.frame import Frame, output_key
from lightning_qat.function_hooks.function_table import (
    FUNCTION_TABLE,
    FunctionTraits,
    function_name,
    leads_with_real,
    operands_of,
    reader_kind,
)
from lightning_qat.joins.calls import INPUT, Call, Operand, Watch
from lightning_qat.joins.code import code_of
from lightning_qat.joins.constants import ConstantTensors
from lightning_qat.joins.masks import MaskedScores
from lightning_qat.joins.products import WeightUse, is_a_layers_own, weight_owners, weights_read
from lightning_qat.joins.seen_ranges import SeenRanges
from lightning_qat.joins.solver import Event, Producer, Recording, Solution, solve, told_apart
from lightning_qat.joins.values import ConvOutputs, WeightTensors, computes_values
from lightning_qat.joins.written_norms import WrittenNorms
from lightning_qat.layers import QATLayer
from lightning_qat.layers.own_class import has_own_forward
from lightning_qat.model.containers import leaves_of
from lightning_qat.model.forward import is_real_forward
from lightning_qat.model.paths import ModelPaths
from lightning_qat.model.torch_compile import without_compiling
from lightning_qat.model.torch_private import saved_tensors_are_hooked
from lightning_qat.quantizers import names
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec, LayerSpec

EMPTY = "empty tensors"


class Discovery:
    """Records one forward of a model, from which ``solver.py`` plans the quantized tensors.

    Recorded are the inputs of QAT layers, the calls of functions in the table, and the outputs of
    the model. Calls of other functions that compute new values are listed as left in float.

    Args:
        model: A model with its QAT layers.
        recipe: Says which modules stay float and gives the specs of joins.
        paths: The model's present paths, where the caller has them.
        observes: Note the ranges of tensors, for ``ranges_of``.

    Attributes:
        entered: Paths of the modules that have run.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        paths: ModelPaths | None = None,
        *,
        observes: bool = False,
    ) -> None:
        self.model, self.recipe = model, recipe
        self.paths = paths or ModelPaths.of(model)
        self._seen = Recording()
        self._returned: dict[Key, Operand] = {}
        self._frames: list[tuple[str, Frame] | None] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._alive: list[Any] = []
        self._runs: Counter[str] = Counter()
        self.checkpointed = False
        """Whether saved tensors were hooked while a module ran."""
        self._ranges = SeenRanges(observes=observes)
        self._weights = WeightTensors(self.paths.names)
        self._constants = ConstantTensors(self.paths.names)
        self._masked_scores, self._norms = MaskedScores(), WrittenNorms()
        self._convs = ConvOutputs()
        self._weight_owners = weight_owners(self.paths.by_path)
        self._rounding: set[str] = set()
        self.entered: set[str] = set()
        self._modules = self.paths.by_path

    @contextmanager
    def watching(self, *, root_runs: bool = False) -> Iterator[None]:
        """Watch every module and torch function inside the block.

        Args:
            root_runs: The model's own forward is running already.
        """
        handles = []
        for module, (path, *_) in self.paths.names.items():
            if root_runs and not path:
                self._frames.append((path, Frame(module)))
                self.entered.add(path)
                continue
            if isinstance(module, torch.jit.ScriptModule):
                # It takes no hooks, and what it calls is not seen.
                continue
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with without_compiling(), Watch(self.call):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def outputs(self, output: Any) -> None:
        """Note what the model returns: with ``outputs=True`` its float tensors are consumed."""
        if self._frames:
            self._leave(self.model, (), output)
        for leaf in leaves_of(output) if self.recipe.outputs else ():
            if not isinstance(leaf, Tensor):
                continue
            operand = self._returned.get(key_of(leaf))
            if operand is None or self._is_exact(leaf):
                continue
            if leaf.is_floating_point() and leaf.dim() and leaf.numel():
                self._seen.owners[operand.module] = None
                self._ranges.take(leaf)
                self._seen.events.append(Event((operand,), (key_of(leaf),)))

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        path = self.paths.name(module)
        if isinstance(module, ActivationQuantizer):
            layer, _, name = path.rpartition(".")
            if name == names.INPUT and args and isinstance(args[0], Tensor):
                self._record_input(layer, args[0])
        if isinstance(module, WeightQuantizer) and self._frames and self._frames[-1] is not None:
            self._rounding.add(self._frames[-1][0])
        self.checkpointed = self.checkpointed or saved_tensors_are_hooked()
        self.entered.add(path)
        if isinstance(module, Quantizer) or not is_real_forward(module):
            self._frames.append(None)
            return
        caller = next((frame for frame in reversed(self._frames) if frame is not None), None)
        frame = Frame(module, path=path, caller=None if caller is None else caller[1])
        self._frames.append((path, frame))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame = self._frames.pop()
        if frame is None:
            return
        for number, leaf in enumerate(leaves_of(output)):
            if isinstance(leaf, Tensor):
                if _is_opaque(module):
                    self._seen.producers[key_of(leaf)] = Producer(frame[0])
                # The innermost module that returns a tensor returns first.
                run = self._runs[frame[0]]
                made_by = self._seen.producers.get(key_of(leaf))
                here = made_by is not None and made_by.place[0] == frame[0]
                key = output_key(number, made_by.place[1] if made_by and here else "")
                operand = Operand(frame[0], "output", number, run, key)
                self._returned.setdefault(key_of(leaf), operand)
                self._alive.append(leaf)
        self._runs[frame[0]] += 1

    def _record_input(self, layer: str, x: Tensor) -> None:
        self._alive.append(x)
        self._ranges.take(x)
        self._convs.enter(layer, x)
        self._seen.events.append(Event((Operand(layer, INPUT, 0, 0),), (key_of(x),)))

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one torch function and note what it does to quantization."""
        frame = self._frames[-1] if self._frames else None
        if frame is None or _is_opaque(self._modules[frame[0]]):
            return func(*args, **kwargs)
        if func is FUSED_ATTENTION:
            args, kwargs = attention_arguments(args, kwargs)
        known, path = FUNCTION_TABLE.get(func), frame[0]
        if known is not None and known.of_layers and is_a_layers_own(self._modules[path]):
            known = None
        if known is not None and not frame[1].place(known.name):
            # Of a module that is none of the model's, or in a graph.
            known = None
        name = function_name(func)
        number, key = 0, ""
        tensors = () if known is None else operands_of(known, args, kwargs)
        keys = tuple(key_of(t) for t in tensors)
        self._alive += tensors
        if known is not None and tensors:
            key = frame[1].call_key(name)
            number = self._counts[path, name]
            self._counts[path, name] += 1
            frame[1].count_call(key)
            self._seen.owners[path] = None
            self._seen.call_keys.setdefault(path, {})[key] = None
            if frame[1].is_users:
                self._seen.chains.setdefault(path, {})[call_chain()] = None
            for tensor in tensors:
                self._ranges.take(tensor)
        elif known is not None and leads_with_real(args):
            key = frame[1].call_key(known.name)
            frame[1].count_call(key)
            self._seen.call_keys.setdefault(path, {})[key] = None
        inner: dict[int, Tensor] = {}
        fused = known if func is FUSED_ATTENTION and tensors else None
        inputs = self._constants.inputs(func, args, kwargs)
        if fused is not None and self._why_float(fused, path, tensors) is None:
            result = attend(*args, quantize=inner.setdefault, **kwargs)
        else:
            result = func(*args, **kwargs)
        leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self._alive += leaves
        exact = self._constants.follow(func, args, kwargs, leaves, inputs)
        call = Call(path, name, number, key, known, func, args, kwargs, tensors, keys, leaves)
        self._note_producers(call, frame[1])
        self._convs.follow(call)
        from_weights = self._weights.follow(args, kwargs, call.outs, self._constants.is_fixed)
        if not from_weights and not (exact and call.outs):
            self._note(call)
            self._record_inner(call, inner)
        elif call.keeps_values:
            self._inherit(keys[0], call.outs, name)
        return result

    def _note_producers(self, call: Call, frame: Frame) -> None:
        # Code of the user may make an output in several places; that of a library does not.
        site = frame.place(call.function) if frame.is_users else ""
        place = (call.module, site) if "@" in site else ("", "")
        fixed_range, not_negative = call.known_range
        source = self._seen.producers.get(call.cast_of) if call.cast_of else None
        if source is not None:
            fixed_range, not_negative = source.fixed_range, source.not_negative
        for out in call.outs:
            if out not in call.keys:
                self._seen.producers[out] = Producer(call.made, fixed_range, not_negative, place)

    def _note(self, call: Call) -> None:
        """Note what a call does to quantization."""
        given = call.float_operands
        data = [x for x in given if not (key_of(x) in self._weights or self._is_exact(x))]
        name = call.function
        if self._norms.continues(name, call.outs, data):
            return
        alone = len(data) == sum(1 for x in given if x.dim() or not self._is_exact(x))
        ends_norm = self._norms.follow(name, call.args, call.leaves, data, alone=alone)
        before = len(self._seen.events)
        if call.known is not None and call.tensors:
            self._record_call(call.known, call)
        elif computes_values(
            self._modules[call.module], call.func, call.args, call.kwargs, call.leaves
        ):
            self._leave_float(call)
        events = self._seen.events[before:]
        self._masked_scores.follow(
            *(name, call.args, call.kwargs, call.outs),
            keeps_values=call.keeps_values,
            is_exact=self._is_exact,
            events=events,
        )
        for event in events:
            self._norms.remember(call.outs, partial(self._unplan, event), event.tensors[0])
        if ends_norm:
            self._norms.take_back(call.outs)

    def _is_exact(self, x: Tensor) -> bool:
        return key_of(x) not in self._weights and self._constants.is_exact(x)

    def _leave_float(self, call: Call) -> None:
        """Note a function that has no row in the table."""
        if call.known_range[0] is not None:
            return
        of_a_number = sum(x.dim() > 0 for x in call.float_operands) < 2
        if call.function in ("add", "sub") and of_a_number:
            return  # such as an epsilon
        nested = any(isinstance(x, Tensor) and x.is_nested for x in call.args)
        why = "nested tensors" if nested else "no integer form is known"
        if call.function in ("mul", "div") and of_a_number and not nested:
            why = "by a number, in float unless a layer in front of it takes the factor"
        left, text = self._seen.left_float, f"{call.made}: {why}"
        left[text] = left.get(text, 0) + 1
        self._norms.remember(call.outs, lambda: left.update({text: left[text] - 1}))

    def _unplan(self, event: Event) -> None:
        self._seen.events = [other for other in self._seen.events if other is not event]

    def _record_call(self, known: FunctionTraits, call: Call) -> None:
        keys = call.keys
        if call.keeps_values:
            # Dropout in eval mode gives its very input back.
            if keys and call.outs[:1] != keys[:1]:
                self._inherit(keys[0], call.outs, known.name)
                event = Event((call.operand(0),), keys[:1], call.outs, quantizes=False)
                self._seen.events.append(event)
            return
        weights = self._weights_read(call) if known.is_product else {}
        of_layer = any(use.layer is not None for use in weights.values())
        empty = not all(x.numel() for x in call.tensors)
        reason = EMPTY if empty else None
        if not of_layer:
            reason = self._why_float(known, call.module, call.tensors)
        if known.name == "softmax":
            for event in self._masked_scores.read_by_softmax(call.tensors[0]):
                self._unplan(event)
        if reason is not None:
            self._seen.left_float[f"{call.operand(0)}: {reason}"] = 1
            return
        tie = known.trait == "concat"
        where = tuple(call.operand(0 if tie else i) for i in range(len(keys)))
        if tie:
            self._seen.events.append(Event(where, keys, call.outs))
            return
        for use in weights.values():
            if use.layer is not None:
                self._reach(
                    use.layer, [k for w, k in zip(where, keys, strict=True) if w not in weights]
                )
        self._seen.weights += weights.values()
        by = self._convs.fusing(call) if self._fuses(call) else {}
        self._seen.events += [
            Event((w,), (k,), fused_by=by.get(number, ""))
            for number, (w, k) in enumerate(zip(where, keys, strict=True))
            if w not in weights
        ]

    def _fuses(self, call: Call) -> bool:
        """Whether a call is a sum of two tensors that the recipe wants fused."""
        return self.recipe.joins == "fused_sums" and not any(
            key_of(x) in self._weights or self._is_exact(x) for x in call.tensors
        )

    def _weights_read(self, call: Call) -> Mapping[Operand, WeightUse]:
        """The operands of a product that are weights."""
        own = self._modules[call.module]
        spec = self.recipe.for_layer(call.module, type(own).__name__)
        spec = spec or LayerSpec(self.recipe.weight, self.recipe.activation)
        numbers = [
            number
            for number, x in enumerate(call.tensors)
            if key_of(x) in self._weights or self._constants.is_fixed(x)
        ]
        return weights_read(call, numbers, own, self._weight_owners, spec)

    def _reach(self, path: str, inputs: Sequence[Key]) -> None:
        """Note that a product reads the weight of a layer, which is as good as a call."""
        layer = self._modules[path]
        self.entered.add(path)
        self._rounding.add(path)
        if isinstance(layer, QATLayer) and layer.quantizes_input:
            self._seen.events += [Event((Operand(path, INPUT, 0, 0),), (key,)) for key in inputs]

    def _record_inner(self, call: Call, inner: Mapping[int, Tensor]) -> None:
        """Record what attention reads and gives inside; see ``attend``."""
        for number, x in inner.items():
            self._alive.append(x)
            self._ranges.take(x)
            fixed_range = WEIGHTS_RANGE if number == WEIGHTS else None
            self._seen.producers[key_of(x)] = Producer(call.made, fixed_range, number == WEIGHTS)
            self._seen.events.append(Event((call.operand(number),), (key_of(x),)))

    def _inherit(self, source: Key, outs: tuple[Key, ...], name: str) -> None:
        """What is known of a tensor's range holds for its reshaped and pooled values."""
        producer = self._seen.producers.get(source)
        for key in outs:
            own = self._seen.producers.get(key)
            if producer is not None and name == "dropout":
                self._seen.producers[key] = producer
            elif producer is not None and own is not None and own.fixed_range is None:
                own.not_negative = own.not_negative or producer.not_negative
                own.fixed_range = producer.fixed_range if name != "relu" else None

    def _why_float(
        self, known: FunctionTraits, path: str, tensors: tuple[Tensor, ...]
    ) -> str | None:
        """Why a join stays float; ``None``: it is quantized."""
        if not all(t.numel() for t in tensors):
            return EMPTY
        if not self.recipe.joins:
            return "the recipe has joins=False"
        kind = type(self._modules[path]).__name__
        if self.recipe.for_layer(path, kind) is None:
            return f"{path or 'the root'} is not selected by the recipe"
        return self._masked_scores.why_float(known.name, tensors, self._seen.producers)

    # ------------------------------------------------------------------ the plan

    def plan(self) -> Solution:
        """The plan of what was seen, and the consumers of each of its quantizers."""
        solution = solve(self._told_apart(), self._spec)
        unreached = tuple(
            path
            for path, module in self._modules.items()
            if isinstance(module, QATLayer)
            and not self._reaches(path, module)
            and self.paths.name(module) == path
            and not isinstance(self._modules.get(path.rpartition(".")[0]), QATLayer)
        )
        code = code_of(self._modules, self._seen.chains)
        return solution._replace(plan=replace(solution.plan, unreached=unreached, code=code))

    def _reaches(self, path: str, layer: QATLayer) -> bool:
        """Whether the forward has run the layer, and through its quantizers."""
        return path in self.entered and (path in self._rounding or not has_own_forward(layer))

    def _told_apart(self) -> Recording:
        layers = [path for path, module in self._modules.items() if isinstance(module, QATLayer)]
        owners = {path[:end] for path in layers for end, c in enumerate(f"{path}.") if c == "."}
        return told_apart(self._seen, {"", *owners})

    def ranges_of(self, consumers: Mapping[str, Sequence[Operand]]) -> Mapping[str, Tensor]:
        """The ranges of the tensors that consumers read, by the path of their quantizer.

        Args:
            consumers: Quantizer path to consumers, of a plan of this forward or of another one.
        """
        return self._ranges.of(consumers, self._told_apart().events)

    def release(self) -> None:
        """Let the forward's tensors go."""
        self._alive.clear()

    def _spec(self, owner: Operand) -> ActivationSpec:
        """The recipe's spec of a consumer."""
        if owner.function == INPUT:
            quantizer = self._modules[owner.quantizer_path]
            assert isinstance(quantizer, ActivationQuantizer)
            return quantizer.spec
        kind = type(self._modules[owner.module]).__name__
        return self.recipe.for_call(owner.module, kind, reader_kind(owner.function))


def _is_opaque(module: nn.Module) -> bool:
    return isinstance(module, QATLayer) and module.opaque
