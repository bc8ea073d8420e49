"""The names of quantizers in a model: keys of its state_dict, so part of the checkpoint format.

========================================  ====================================================
path                                      quantizes
========================================  ====================================================
``conv.input_quantizer``                  the input of the layer ``conv``
``conv.weight_quantizer``                 its ``weight``
``lstm.weight_quantizer_hh_l0``           the parameter ``weight_hh_l0`` of a recurrent layer
``lstm.input_quantizer_l1``               the input of a recurrent layer's second layer
``lstm.hidden_quantizer_l0_reverse``      a hidden state; of one layer, in one direction
``lstm.projection_quantizer_l0``          what the projection of an LSTM reads
``block.qat_joins.add_0_1``               operand 1 of the first ``add`` in the forward of ``block``
========================================  ====================================================
"""

from __future__ import annotations

import re
from typing import Literal

INPUT = "input_quantizer"
"""The submodule of a layer that quantizes its input."""

JOINS = "qat_joins"
"""What holds the quantizers of a module's functional calls and of its outputs; no child of it."""

PLAN = "_qat_plan"
"""The state_dict key of a model's plan."""

SPEC = "_extra_state"
"""torch's key for the extra state of a module; a quantizer keeps its spec there."""

_QUANTIZER = re.compile(r"(input|hidden|projection|weight)_quantizer(_\w+)?")


def weight_quantizer_name(weight: str) -> str:
    """The submodule that quantizes a weight.

    Example:
        >>> weight_quantizer_name("weight"), weight_quantizer_name("weight_hh_l0")
        ('weight_quantizer', 'weight_quantizer_hh_l0')
    """
    return weight.replace("weight", "weight_quantizer", 1)


def activation_quantizer_name(tensor: str, ending: str) -> str:
    """The submodule of a recurrent layer that quantizes one of its activations.

    Args:
        tensor: ``input``, ``hidden`` or ``projection``.
        ending: The end of its parameters' names, such as ``_l0_reverse``.

    Example:
        >>> activation_quantizer_name("hidden", "_l0")
        'hidden_quantizer_l0'
    """
    return f"{tensor}_quantizer{ending}"


def quantizer_role(name: str) -> Literal["activation", "weight"] | None:
    """The kind of tensor that a submodule of a QAT layer quantizes; ``None``: it is no quantizer.

    Example:
        >>> quantizer_role("hidden_quantizer_l0"), quantizer_role("weight_quantizer")
        ('activation', 'weight')
    """
    found = _QUANTIZER.fullmatch(name)
    if found is None:
        return None
    return "weight" if found[1] == "weight" else "activation"


def input_path(layer: str) -> str:
    """Path of the quantizer of a layer's input.

    Example:
        >>> input_path("conv"), input_path("")
        ('conv.input_quantizer', 'input_quantizer')
    """
    return f"{layer}.{INPUT}".lstrip(".")


def join_path(module: str, function: str, call: str | int, operand: str | int) -> str:
    """Path of the quantizer of an operand of a functional call in a module's forward.

    Example:
        >>> join_path("block", "add", 0, 1)
        'block.qat_joins.add_0_1'
    """
    return f"{module}.{JOINS}.{function}_{call}_{operand}".lstrip(".")


def owner_path(quantizer: str) -> str:
    """Path of the layer, or of the module with the functional calls, that a quantizer belongs to.

    Example:
        >>> owner_path("net.conv.input_quantizer"), owner_path("net.block.qat_joins.add_0_1")
        ('net.conv', 'net.block')
    """
    return quantizer.rpartition(".")[0].removesuffix(JOINS).removesuffix(".")


def tensor_key(quantizer: str) -> str:
    """The key of a quantized tensor in the converted model, from the path of its quantizer.

    Example:
        >>> tensor_key("net.conv.input_quantizer"), tensor_key("net.block.qat_joins.add_0_1")
        ('net.conv.input', 'net.block.add_0_1')
    """
    owner, dot, name = quantizer.replace(f"{JOINS}.", "").rpartition(".")
    return f"{owner}{dot}{name.replace('_quantizer', '')}"


def place(quantizer: str) -> str:
    """A quantizer's place in error messages: the layer whose input it reads, or the call.

    Example:
        >>> place("net.conv.input_quantizer"), place("net.block.qat_joins.add_0_1")
        ('net.conv', 'net.block.add_0_1')
    """
    return quantizer.removesuffix(f".{INPUT}").replace(f"{JOINS}.", "")


def quantizer_of_key(key: str) -> str | None:
    """Path of the quantizer whose spec is at a key of a state_dict; ``None``: it is another key.

    Every quantizer has exactly one such key.

    Example:
        >>> quantizer_of_key("net.conv.input_quantizer._extra_state")
        'net.conv.input_quantizer'
    """
    path, _, name = key.rpartition(".")
    parent, _, child = path.rpartition(".")
    joined = parent.rpartition(".")[2] == JOINS
    return path if name == SPEC and (joined or quantizer_role(child) is not None) else None
