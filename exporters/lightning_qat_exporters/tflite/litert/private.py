"""Everything private of torch and litert-torch that this backend depends on.

A function here changes the process or imports a module without a promise of compatibility. What a
function changes, it restores, also after an exception.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def quantized_decomposed() -> Any:
    """Return torch's namespace ``quantized_decomposed``.

    ``torch.ao.quantization.fx._decomposed`` registers its operators when it is imported. Without
    that module no scale reaches litert-torch, and every export of this backend fails.
    """
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    return importlib.import_module("torch").ops.quantized_decomposed


@contextmanager
def without_progress() -> Iterator[None]:
    """Turn off litert-torch's own progress bar and its silencing of torch's logs.

    litert-torch reads both from environment variables, whenever it needs them. If it stops reading
    them, exports print a progress bar.
    """
    settings = {"LITERT_TORCH_SHOW_PROGRESS": "n", "LITERT_TORCH_SILENCE_TORCH_LOGS": "n"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def registered(operator: Any, lowering: Callable[..., Any]) -> Iterator[None]:
    """Add a lowering to litert-torch's registry of operators.

    Without the registry, models with integer transposed convolutions cannot be converted.

    Args:
        operator: An overload of a torch operator.
        lowering: Called with litert-torch's context and the operator's arguments.
    """
    from litert_torch.backend.lowerings import registry

    table: dict[Any, Any] = registry.global_registry.registered_ops
    before = table.get(operator)
    registry.global_registry.register(operator, lowering)
    try:
        yield
    finally:
        table.pop(operator, None)
        if before is not None:
            table[operator] = before


def custom_call(
    context: Any, name: str, inputs: list[Any], attributes: dict[str, str | int]
) -> Any:
    """Write an operator of LiteRT, whose first input is its output's shape, in MLIR.

    litert-torch's converter turns a StableHLO ``custom_call`` with the name of one of its own
    operators into that operator. Without this, or without the converter's MLIR bindings, models
    with integer transposed convolutions cannot be converted.

    Args:
        context: litert-torch's context of the torch operator that is lowered.
        name: Name in the converter, such as ``tfl.transpose_conv``.
        inputs: Values after the shape, in the operator's order.
        attributes: The operator's options.
    """
    from litert_converter.mlir import ir as mlir
    from litert_converter.mlir.dialects import stablehlo
    from litert_torch.backend.lowerings import utils

    # Compiled, with names that no type checker sees.
    ir: Any = mlir

    def attribute(value: str | int) -> Any:
        if isinstance(value, str):
            return ir.StringAttr.get(value)
        return ir.IntegerAttr.get(ir.IntegerType.get_signless(32), value)

    types = utils.node_meta_to_ir_types(context.node)
    shape = utils.convert_shape_to_ir_value(list(ir.RankedTensorType(types[0]).shape))
    config = ir.DictAttr.get({key: attribute(value) for key, value in attributes.items()})
    return stablehlo.custom_call(
        result=types,
        inputs=[shape, *inputs],
        call_target_name=ir.StringAttr.get(name),
        has_side_effect=ir.BoolAttr.get(False),
        backend_config=ir.StringAttr.get(str(config)),
    )
