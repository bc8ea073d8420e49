"""Who is compared: our recipes, and other tools as far as they are installed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version

from torch import Tensor, nn

from benchmarks.accuracy.protocol import calibrate, calibration, correct
from benchmarks.peers import Peer, installed
from lightning_qat import ActivationSpec, Recipe, WeightSpec, prepare
from lightning_qat.recipe.schedule import Phase
from lightning_qat.training.phases import apply_phase

Bits = tuple[int, int]
"""Of weights and activations."""

POINTS: tuple[Bits, ...] = ((8, 8), (4, 8), (4, 4), (2, 4))


def named(bits: Bits) -> str:
    """``W4A8`` for 4 and 8 bits."""
    return f"W{bits[0]}A{bits[1]}"


@dataclass(frozen=True)
class Tool:
    """A way from a float checkpoint to a network that trains with quantization.

    Args:
        title: For tables, with its version.
        prepare: Float network (stays as it is), training inputs, seed, bits.
        calibrated: What is measured without training; called with a copy, inputs and the seed.
        freeze: Called when 60 % of the training is done.
        points: The bits that it is measured at.
        tasks: The tasks that it can quantize; ``None``: all.
    """

    title: str
    prepare: Callable[[nn.Module, Tensor, int, Bits], nn.Module]
    calibrated: Callable[[nn.Module, Tensor, int], None] = lambda model, x, seed: None
    freeze: Callable[[nn.Module], None] = lambda model: None
    points: tuple[Bits, ...] = POINTS
    tasks: frozenset[str] | None = None


def learned(weight: int, activation: int, first_last: int | None = None) -> Recipe:
    """Learned scales for weights and activations, from the least squared error.

    Embeddings stay float, as in other tools.
    """
    return Recipe(
        first_last=first_last,
        weight=WeightSpec(bits=weight, quantizer="learned"),
        activation=ActivationSpec(bits=activation, quantizer="learned", calibration="mse"),
        joins=False,
        outputs=False,
        exclude=("type:Embedding",),
    )


def first_last(weight: int, activation: int) -> Recipe:
    """``learned``, with 8 bits for the first and the last layer, as is usual at few bits."""
    return learned(weight, activation, 8)


def observed(weight: int, activation: int) -> Recipe:
    """Scales that follow the data and the weights."""
    return Recipe(
        weight=WeightSpec(bits=weight),
        activation=ActivationSpec(bits=activation),
        joins=False,
        outputs=False,
        exclude=("type:Embedding",),
    )


def whole(weight: int, activation: int) -> Recipe:
    """``observed``, and what operations outside of layers read: sums, joins, attention."""
    return Recipe(weight=WeightSpec(bits=weight), activation=ActivationSpec(bits=activation))


def w4a8(weight: int, activation: int) -> Recipe:
    """The preset: learned scales of weights, ranges that follow, ends and joins at 8 bits."""
    assert (weight, activation) == (4, 8)
    return Recipe.load("w4a8")


def w4a4(weight: int, activation: int) -> Recipe:
    """The preset: ``first_last``, and what sums and norms read at 8 bits."""
    assert (weight, activation) == (4, 4)
    return Recipe.load("w4a4")


def w4a4_joins(weight: int, activation: int) -> Recipe:
    """The preset with as few bits for sums and norms as for layers."""
    return replace(w4a4(weight, activation), join_bits=None)


def w4a4_observed(weight: int, activation: int) -> Recipe:
    """``w4a4_joins`` with scales that follow."""
    return replace(whole(weight, activation), first_last=8)


def _ours(recipe: Callable[[int, int], Recipe]) -> Callable[..., nn.Module]:
    def prepared(checkpoint: nn.Module, x: Tensor, seed: int, bits: Bits) -> nn.Module:
        model = copy.deepcopy(checkpoint)
        made = recipe(*bits)
        prepare(model, made, x[:2])
        calibrate(model, x, seed)
        follows = made.activation.quantizer == "observed"
        apply_phase(model, Phase("quantize", follows, True, False))
        return model

    return prepared


def _theirs(peer: Peer) -> Callable[..., nn.Module]:
    def prepared(checkpoint: nn.Module, x: Tensor, seed: int, bits: Bits) -> nn.Module:
        return peer.prepare(checkpoint, calibration(x, seed), *bits)

    return prepared


def tools() -> Iterator[tuple[str, Tool]]:
    """Names on the command line, and tools."""
    own = version("lightning-qat")
    for name, recipe, points in (
        ("learned", learned, POINTS),
        ("first_last", first_last, ((4, 4), (2, 4))),
        ("observed", observed, ((8, 8), (4, 8))),
        ("whole", whole, ((8, 8),)),
        ("w4a8", w4a8, ((4, 8),)),
        ("w4a4", w4a4, ((4, 4),)),
        ("w4a4_joins", w4a4_joins, ((4, 4),)),
        ("w4a4_observed", w4a4_observed, ((4, 4),)),
    ):
        yield name, Tool(f"ours {own}, {name}", _ours(recipe), correct, points=points)
    for name, peer in installed()[0].items():
        yield (
            name.split()[0],
            Tool(
                name,
                _theirs(peer),
                lambda model, x, seed, peer=peer: peer.freeze(model),  # type: ignore[misc]
                peer.freeze,
                tuple(bits for bits in POINTS if min(bits) >= peer.fewest_bits),
                # They quantize convolutions and linear layers, no recurrent ones.
                tasks=frozenset({"digits", "mnist1d", "shapes", "text", "tones"}),
            ),
        )
