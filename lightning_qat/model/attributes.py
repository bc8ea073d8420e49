"""The names of every attribute that this package sets on a user's modules and tensors.

They are in the ``__dict__`` of the object, so they are copied with it, and none is a child of the
user's module. The quantizers of a module's calls are there too, as ``qat_joins``
(``joins/held.py``). One more, ``_qat_int_repr`` on quantized tensors, belongs to
``numerics/int_repr.py``, which imports nothing from here.
"""

from __future__ import annotations

HOOKS = "_qat_hooks"
"""On a module: the ``ModuleHooks`` that quantize the calls of its forward."""

PLAN_KEEPER = "_qat_plan_keeper"
"""On a model: what writes its plan of quantized tensors into its state_dict."""

PLAN_HANDLES = "_qat_plan_handles"
"""On a model: the handles of the state_dict hooks of its plan keeper."""

FIRST_FORWARD = "_qat_first_forward"
"""On a model: the ``FirstForward`` that waits to make its plan."""

JOINS_LOADER = "_qat_joins_loader"
"""On a module: the handle of the hook that loads the quantizers of its calls."""

BATCHNORM_HOLD = "_lightning_qat_hold"
"""On a batch norm: the handle of the hook that holds it in eval mode while it is frozen, and the
mode that it had before."""
