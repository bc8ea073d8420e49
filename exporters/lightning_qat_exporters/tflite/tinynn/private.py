"""Everything private of TinyNeuralNetwork that this backend depends on.

A function here changes a part of TinyNeuralNetwork, or the process around it, for the time of a
``with`` block. What it changes, it restores, also after an exception.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lightning_qat_exporters.quiet import without_remarks

_WARNINGS = (
    # The converter reads integers by torch's quantized dtypes, whose removal is announced.
    ("torch.quantize_per_tensor.*quantized tensor creation functions", UserWarning),
    # It reads TorchScript.
    (r"`torch\.jit\..*` is deprecated", DeprecationWarning),
    # torch's own deepcopy of a program.
    (".*LeafSpec.*is deprecated", FutureWarning),
    # It compares versions with distutils and calls flatbuffers by an old name.
    ("(The distutils package|distutils Version classes).* deprecated", DeprecationWarning),
    ("numElems is deprecated", DeprecationWarning),
)


@contextmanager
def contained() -> Iterator[None]:
    """Restore what TinyNeuralNetwork changes in the process, and keep it silent.

    Importing it installs a handler on the root logger; its loggers and some operators print. It
    creates tensors of the default dtype, which must be float32 for it.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with without_remarks("tinynn", _WARNINGS, prints=True):
            # torch says this once in a process; from inside the tracer it would reach stderr.
            torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def registered(converters: Mapping[str, Any]) -> Iterator[None]:
    """Add operators to the converter's table, by the names of their nodes in TorchScript.

    Without the table, or with another, the converter refuses our operators and no model with an
    integer layer can be exported.
    """
    module = importlib.import_module("tinynn.converter.operators.torch")
    table: dict[str, Any] = module.OPERATOR_CONVERTER_DICT
    before = {name: table[name] for name in converters if name in table}
    table.update(converters)
    try:
        yield
    finally:
        for name in converters:
            table.pop(name, None)
        table.update(before)


@contextmanager
def without_passes(*names: str) -> Iterator[None]:
    """Replace passes of the converter's optimizer by functions that do nothing.

    If such a pass has another name in the converter, this raises ``KeyError``; if it were left in,
    the optimizer would merge quantizations and so change numbers that were trained.
    """
    optimizer: Any = importlib.import_module("tinynn.converter.operators.optimize").GraphOptimizer
    before: dict[str, Callable[..., Any]] = {name: vars(optimizer)[name] for name in names}
    try:
        for name in names:
            setattr(optimizer, name, lambda _optimizer, **_options: None)
        yield
    finally:
        for name, method in before.items():
            setattr(optimizer, name, method)


@contextmanager
def ordered_sets(ordered: type) -> Iterator[None]:
    """Give the converter's modules another ``set``: a module's own name hides the built-in one.

    The converter iterates over sets of nodes, in the order of their addresses, and numbers what it
    creates meanwhile. Without this, the same model gives a file with other bytes each time.

    Args:
        ordered: A set that is iterated in the order in which it was filled.
    """
    names = ("tinynn.converter.operators.graph", "tinynn.converter.operators.optimize")
    modules = [importlib.import_module(name) for name in names]
    try:
        for module in modules:
            vars(module)["set"] = ordered
        yield
    finally:
        for module in modules:
            vars(module).pop("set", None)
