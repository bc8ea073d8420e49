"""Check a QDQ file against the rules that TensorRT's ONNX parser and documents have for it.

Nothing here was tried with TensorRT. The rules are those of onnx-tensorrt 10.1
(``onnxOpImporters.cpp``, ``docs/operators.md``) and of NVIDIA's "Working with Quantized Types"
and Quantization Toolkit; docs/onnx.md names the source of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from lightning_qat.export.lint import Finding, Severity
from lightning_qat_exporters.fake_quant_onnx.tensorrt_lint.pairs import pair_findings
from lightning_qat_exporters.fake_quant_onnx.tensorrt_lint.placement import placement_findings
from lightning_qat_exporters.onnx_files.read import read_onnx, require_quantized

_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "advice")
_NEWEST_OPSET = 20


def lint_tensorrt(path: Path) -> tuple[Finding, ...]:
    """Everything that a QDQ file breaks, errors first.

    Args:
        path: The QDQ file, with its external data beside it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no ONNX model, or holds no QuantizeLinear and DequantizeLinear.
    """
    model = read_onnx(path)
    require_quantized(model, path)
    graph = model.graph
    found = (*_opset(model), *pair_findings(graph), *placement_findings(graph))
    return tuple(sorted(found, key=lambda finding: _SEVERITIES.index(finding.severity)))


def _opset(model: ir.Model) -> Iterator[Finding]:
    opset = model.opset_imports.get("", 0)
    if opset > _NEWEST_OPSET:
        yield Finding(
            "warning",
            "opset_import",
            f"TensorRT 10.0 and 10.1 read opsets 9 to {_NEWEST_OPSET}",
            f"opset {opset}",
            f"Export at opset {_NEWEST_OPSET}, or take a TensorRT that reads this one",
        )
