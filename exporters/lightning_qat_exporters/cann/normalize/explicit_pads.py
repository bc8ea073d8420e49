"""Write ``auto_pad`` of convolutions over three dimensions as numbers.

CANN's parser takes SAME_UPPER and SAME_LOWER in two dimensions and fails in three
(``common/src/framework/conv_onnx_plugin.cpp`` of ops-nn).
"""

from __future__ import annotations

import onnx_ir as ir

from lightning_qat_exporters.cann.qdq_graph.constants import constant

_SAME = ("SAME_UPPER", "SAME_LOWER")


class ExplicitPads(ir.passes.InPlacePass):
    """Replace ``auto_pad`` where the pads are known: at stride 1, or with sizes in the file.

    What is not known stays as it is, and ``lint`` names it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        written = 0
        for node in model.graph:
            if node.op_type not in ("Conv", "ConvTranspose") or node.domain:
                continue
            if node.attributes.get_string("auto_pad", "NOTSET") in _SAME:
                written += _write_pads(node)
        return ir.passes.PassResult(model, modified=written > 0)


def _write_pads(node: ir.Node) -> bool:
    kernel = _kernel(node)
    if kernel is None or len(kernel) != 3:
        return False
    ones = [1] * len(kernel)
    strides = list(node.attributes.get_ints("strides", ones))
    reach = [
        (size - 1) * step + 1
        for size, step in zip(kernel, node.attributes.get_ints("dilations", ones), strict=True)
    ]
    if node.op_type == "Conv":
        totals = _of_convolution(node, strides, reach)
    else:
        # The output is the input times the stride, whatever its size.
        beside = node.attributes.get_ints("output_padding", [0] * len(kernel))
        if "output_shape" in node.attributes:
            return False
        totals = [r + b - s for r, b, s in zip(reach, beside, strides, strict=True)]
    if totals is None or min(totals) < 0:
        return False
    more, less = [t - t // 2 for t in totals], [t // 2 for t in totals]
    upper = node.attributes.get_string("auto_pad", "") == "SAME_UPPER"
    # ONNX: an odd pad more goes to the end with SAME_UPPER, of a transposed one as well.
    begins, ends = (less, more) if upper else (more, less)
    node.attributes.pop("auto_pad")
    node.attributes.add(ir.AttrInt64s("pads", [*begins, *ends]))
    return True


def _kernel(node: ir.Node) -> list[int] | None:
    if "kernel_shape" in node.attributes:
        return list(node.attributes.get_ints("kernel_shape", ()))
    weight = node.inputs[1]
    if weight is not None and weight.shape is not None and weight.shape.is_static():
        return [int(n) for n in weight.shape.numpy()[2:]]
    array = constant(weight)
    return None if array is None else list(array.shape[2:])


def _of_convolution(node: ir.Node, strides: list[int], reach: list[int]) -> list[int] | None:
    source = node.inputs[0]
    shape = None if source is None or source.shape is None else list(source.shape)[2:]
    if shape is not None and len(shape) != len(strides):
        return None  # the file declares another rank than its kernel has
    totals = []
    for axis, (stride, size) in enumerate(zip(strides, reach, strict=True)):
        if stride == 1:
            totals.append(size - 1)
            continue
        length = None if shape is None else shape[axis]
        if not isinstance(length, int):
            return None
        totals.append(max((-(-length // stride) - 1) * stride + size - length, 0))
    return totals
