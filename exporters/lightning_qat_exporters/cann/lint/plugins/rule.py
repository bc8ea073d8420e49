"""The form of a rule on a node, and the node as a rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx

from lightning_qat.export.lint import Finding, Severity
from lightning_qat_exporters.cann.deploy_file import DeployFile, attributes, name_of


@dataclass(frozen=True)
class Rule:
    """What a node must be; what ONNX itself demands is no rule here.

    Args:
        operators: The ONNX operators that it is for, with spaces between.
        must: What must hold.
        source: Where CANN says so: repository and file.
        broken: What a node has instead, or an empty text.
        remedy: What to do.
        severity: ``error``: the plugin refuses the node, or computes something else.
            ``warning``: a documented range.
    """

    operators: str
    must: str
    source: str
    broken: Callable[[PluginNode], str]
    remedy: str
    severity: Severity = "error"

    def findings(self, node: PluginNode) -> Iterator[Finding]:
        """The finding, where a node breaks the rule."""
        got = self.broken(node)
        if got:
            must = f"{self.must} ({self.source})"
            yield Finding(self.severity, name_of(node.proto), must, got, self.remedy)


class PluginNode:
    """A node with ONNX's defaults at hand.

    Args:
        proto: The node.
        file: Where it is from.
        opset: Of the file.
    """

    def __init__(self, proto: onnx.NodeProto, file: DeployFile, opset: int) -> None:
        self.proto, self.file, self.opset = proto, file, opset

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """The attributes that are written."""
        return attributes(self.proto)

    @property
    def inputs(self) -> Sequence[str]:
        """Names of the inputs; empty where one is left out."""
        return tuple(self.proto.input)

    def has_input(self, index: int) -> bool:
        """Whether an input is given."""
        return index < len(self.inputs) and self.inputs[index] != ""

    def sizes(self, index: int) -> tuple[int | None, ...] | None:
        """The shape of an input, where the file tells it; unknown sizes are None."""
        name = self.inputs[index] if index < len(self.inputs) else ""
        tensor = self.file.tensor(name)
        return tuple(tensor.dims) if tensor is not None else self.file.shapes.get(name)

    def rank(self, index: int = 0) -> int | None:
        """The number of dimensions of an input, where the file tells it."""
        sizes = self.sizes(index)
        return None if sizes is None else len(sizes)

    @cached_property
    def window(self) -> tuple[int, ...]:
        """Sizes of the kernel: an attribute, or of the weight behind its first two axes."""
        if "kernel_shape" in self.values:
            return tuple(self.values["kernel_shape"])
        weight = self.sizes(1)
        return tuple(size or 0 for size in weight[2:]) if weight is not None else ()

    @property
    def is_integer(self) -> bool:
        """Whether it is a layer that computes on integers."""
        return self.file.is_integer_layer(self.proto)

    def differs(self, **defaults: Any) -> str:
        """The attributes that are written with another value than these."""
        return ", ".join(
            f"{key} {self.values[key]}"
            for key, default in defaults.items()
            if key in self.values and self.values[key] != default
        )
