"""What torch works out anew at every export, although it never changes: here once per process."""

import copy
import functools
import sys
from typing import Any

import torch
import torch._export.utils


def remember() -> None:
    """Let torch remember it; half of the time of exporting a small network goes into it.

    Only time changes: what is remembered depends on nothing that a test does. A version of torch
    that has none of these functions stays as it is.
    """
    _remember_composites()
    if "onnxscript" in sys.modules:  # else no test exports, and importing it takes seconds
        _remember_translations()


def _remember_composites() -> None:
    """torch looks up its 800 composite operators again for each of its 30 namespaces.

    Others come with a module that is imported, or from Python's registry; even counting them takes
    a twentieth of a conversion.
    """
    utils: Any = torch._export.utils
    look_up = getattr(utils, "_materialize_cpp_cia_ops", None)
    registered = getattr(torch.library, "_impls", None)
    if look_up is None or registered is None:
        return
    known: set[tuple[int, int]] = set()

    def look_up_new_ones() -> None:
        state = (len(sys.modules), len(registered))
        if state not in known:
            look_up()
            known.add(state)

    utils._materialize_cpp_cia_ops = look_up_new_ones


def _remember_translations() -> None:
    """torch.onnx reads the sources of its 500 translations to know their signatures."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # another torch keeps it elsewhere: exports are only slower
        return
    registry: Any = ONNXRegistry
    make = functools.cache(registry.from_torchlib)

    def made(*args: Any, **kwargs: Any) -> Any:
        # A copy: an export adds its own translations.
        own = copy.copy(make(*args, **kwargs))
        own.functions = {target: [*kept] for target, kept in own.functions.items()}
        return own

    registry.from_torchlib = staticmethod(made)
