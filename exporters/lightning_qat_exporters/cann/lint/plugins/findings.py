"""Every rule of CANN's plugins on every node of a deploy file."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_qat.export.lint import Finding
from lightning_qat_exporters.cann.deploy_file import DeployFile
from lightning_qat_exporters.cann.lint.plugins.functions import FUNCTION_RULES
from lightning_qat_exporters.cann.lint.plugins.layers import LAYER_RULES
from lightning_qat_exporters.cann.lint.plugins.moves import MOVE_RULES
from lightning_qat_exporters.cann.lint.plugins.pools import POOL_RULES
from lightning_qat_exporters.cann.lint.plugins.registered import registration_findings
from lightning_qat_exporters.cann.lint.plugins.rule import PluginNode, Rule
from lightning_qat_exporters.onnx_files.nested import all_nodes
from lightning_qat_exporters.onnx_files.other_domains import OWN

_RULES: dict[str, list[Rule]] = {}
for _rule in (*LAYER_RULES, *POOL_RULES, *MOVE_RULES, *FUNCTION_RULES):
    for _operator in _rule.operators.split():
        _RULES.setdefault(_operator, []).append(_rule)


def plugin_findings(file: DeployFile, opset: int) -> Iterator[Finding]:
    """What the nodes of a file break, those in branches of If too."""
    nodes = tuple(node for node in all_nodes(file.proto.graph.node) if node.domain in OWN)
    yield from registration_findings(nodes, opset)
    for proto in nodes:
        node = PluginNode(proto, file, opset)
        for rule in _RULES.get(proto.op_type, ()):
            yield from rule.findings(node)
