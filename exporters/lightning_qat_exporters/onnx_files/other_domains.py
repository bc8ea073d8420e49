"""Operators of other domains than ONNX's, which may have the names of ONNX's."""

from __future__ import annotations

from collections.abc import Iterable

from onnx import NodeProto

OWN = ("", "ai.onnx")
"""The names of ONNX's domain."""

_AS_ONNX = {("com.microsoft", "QuantizeLinear"), ("com.microsoft", "DequantizeLinear")}
"""ONNX Runtime's quantizers of 16 and 4 bits, older than ONNX's, with the same inputs."""


def named_by_domain(nodes: Iterable[NodeProto]) -> tuple[NodeProto, ...]:
    """Nodes whose ``op_type`` tells what they compute.

    Those of other domains are copies with the domain in ``op_type``, such as ``own.Conv``: nobody
    knows their inputs and attributes.
    """
    return tuple(_named(node) for node in nodes)


def _named(node: NodeProto) -> NodeProto:
    if node.domain in OWN or (node.domain, node.op_type) in _AS_ONNX:
        return node
    named = NodeProto()
    named.CopyFrom(node)
    named.op_type = f"{node.domain}.{node.op_type}"
    return named
