"""Check a deploy model against every rule that ATC's parser and kernels are known to have.

Nothing here was tried with ATC or a device: the rules are those of CANN's public sources and
documents, and of the files that AMCT writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx

from lightning_qat.export.lint import Finding, Severity
from lightning_qat_exporters.cann.deploy_file import RNN_OPS, DeployFile, name_of
from lightning_qat_exporters.cann.lint.layers import layer_findings
from lightning_qat_exporters.cann.lint.plugins.findings import plugin_findings
from lightning_qat_exporters.cann.lint.quantize_nodes import quant_findings
from lightning_qat_exporters.cann.products import FLOAT_CONVOLUTIONS, lacks
from lightning_qat_exporters.onnx_files.read import load_proto

_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "advice")
_PARSED = range(8, 23)
_PARSED_BY_ALL = range(8, 14)
_RNN_PARSED = range(8, 19)


def lint_deploy(path: Path, product: str | None = None) -> tuple[Finding, ...]:
    """Everything that a deploy model breaks, errors first.

    Args:
        path: The deploy model.
        product: One of ``products.WITHOUT``, to check for that product.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no ONNX model.
    """
    proto = load_proto(path)
    if not proto.graph.node:
        raise ValueError(f"{str(path)!r} must be an ONNX model with nodes; it has none.")
    file = DeployFile(proto, path.parent)
    found = (
        *_container(file),
        *quant_findings(file),
        *layer_findings(file),
        *plugin_findings(file, _version(file)),
        *_product_findings(file, product),
    )
    return tuple(sorted(found, key=lambda finding: _SEVERITIES.index(finding.severity)))


def _version(file: DeployFile) -> int:
    """The opset of the default domain; 11 where the file does not say, which is an error anyway."""
    versions = (i.version for i in file.proto.opset_import if i.domain in ("", "ai.onnx"))
    return next(versions, 11)


def _product_findings(file: DeployFile, product: str | None) -> Iterator[Finding]:
    """Operators that a product lacks."""
    convolutions = [
        node for node in file.nodes if node.op_type == "Conv" and file.is_integer_layer(node)
    ]
    if product in FLOAT_CONVOLUTIONS and convolutions:
        yield Finding(
            "warning",
            name_of(convolutions[0]),
            f"{product} should have convolutions of int8; Conv2D's table of types for it lists "
            "none (ops-nn, op_nn_proto_extend.h)",
            f"{len(convolutions)} integer convolutions",
            "Make sure that your CANN version has them, or leave convolutions float",
        )
    for node in file.nodes:
        if lacks(product, node.op_type):
            yield Finding(
                "error",
                name_of(node),
                f"{product} has no {node.op_type}, by CANN's public sources",
                f"{node.op_type} in the file",
                f"Export with CannExporter(product={product!r}), which writes float operators",
            )


def _container(file: DeployFile) -> Iterator[Finding]:
    """Rules on the file as a whole."""
    for node in file.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield Finding(
                "error",
                name_of(node),
                "every node must be in the default domain, Ascend's as well",
                f"{node.op_type.removeprefix(f'{node.domain}.')} in the domain {node.domain!r}",
                "Write the node without a domain, or use an operator of ONNX",
            )
        elif not onnx.defs.has(node.op_type) and not node.op_type.startswith(("Ascend", "Basic")):
            yield Finding(
                "error",
                name_of(node),
                "every operator must be ONNX's or one that CANN adds",
                node.op_type,
                "Remove what a training tool left over, or export QuantizeLinear and "
                "DequantizeLinear there and convert them: lightning-qat convert",
            )
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "AscendWeightQuant"):
            yield Finding(
                "error",
                name_of(node),
                "quantization must be AscendQuant, AscendDequant and AscendAntiQuant",
                node.op_type,
                "Convert the QDQ model: lightning-qat convert model.onnx --to cann --out prefix",
            )
        if node.op_type in RNN_OPS:
            yield Finding(
                "warning",
                name_of(node),
                "the product must have this kernel; Huawei's documents list it for no current one, "
                "and for a sequence length of 1",
                node.op_type,
                "Leave the recurrent layer float unless your product is known to have it",
            )
    yield from _opset(file)
    yield from _names(file)
    graph = file.proto.graph
    for what, values in (("input", graph.input), ("output", graph.output)):
        if not values:
            yield Finding(
                "error",
                graph.name or "graph",
                f"a graph must have an {what} (ge, onnx_parser.cc)",
                f"no {what}",
                "Export a model that reads a tensor and returns one",
            )
    initializers = {tensor.name for tensor in file.proto.graph.initializer}
    for value in file.proto.graph.input:
        if value.name in initializers:
            yield Finding(
                "warning",
                value.name,
                "graph inputs must be real inputs only",
                "a constant among the inputs",
                "Remove it from the inputs; it stays an initializer",
            )
        elif None in file.shapes.get(value.name, (None,)):
            yield Finding(
                "advice",
                value.name,
                "ATC wants every input's shape",
                f"{list(file.shapes.get(value.name, ()))}",
                f'Call ATC with --input_shape="{value.name}:..." or export static shapes',
            )


def _opset(file: DeployFile) -> Iterator[Finding]:
    versions = [(i.domain, i.version) for i in file.proto.opset_import]
    if len(versions) != 1 or versions[0][0] not in ("", "ai.onnx"):
        yield Finding(
            "error",
            "opset_import",
            "there must be one opset, of the default domain",
            f"{versions}",
            "Remove the others; AMCT writes opset 11 alone",
        )
        return
    version = versions[0][1]
    if version not in _PARSED:
        yield Finding(
            "error",
            "opset_import",
            "CANN's parser knows the Ascend operators at opsets 8 to 22",
            f"opset {version}",
            "Export at opset 11",
        )
    elif version not in _PARSED_BY_ALL:
        yield Finding(
            "warning",
            "opset_import",
            "old CANN versions know the Ascend operators at opsets 8 to 13 only, 8.0 up to 16",
            f"opset {version}",
            "Export at opset 11 unless an operator needs more",
        )
    for node in file.nodes:
        if node.op_type in RNN_OPS and version in _PARSED and version not in _RNN_PARSED:
            yield Finding(
                "error",
                name_of(node),
                f"CANN's parser knows {node.op_type} at opsets 8 to 18",
                f"opset {version}",
                "Export at opset 11",
            )


def _names(file: DeployFile) -> Iterator[Finding]:
    for name, count in Counter(node.name for node in file.nodes if node.name).items():
        if count > 1:
            yield Finding(
                "error",
                name,
                "node names must be unique; ATC and the record find layers by them",
                f"{count} nodes of this name",
                "Rename the nodes",
            )
    inputs = {value.name for value in file.proto.graph.input}
    for node in file.nodes:
        if node.name in inputs:
            yield Finding(
                "error",
                node.name,
                "a node must not have the name of a graph input: the parser makes a node of the "
                "input's name, and names must be unique (ge, onnx_parser.cc, pre_checker.cc)",
                f"{node.op_type} and an input, both {node.name!r}",
                "Rename the argument of forward, or the layer",
            )
        if not node.name:
            yield Finding(
                "advice",
                name_of(node),
                "nodes should have names; ATC's messages use them",
                f"{node.op_type} without a name",
                "Name the node",
            )
