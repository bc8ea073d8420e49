"""Imports everything that the rows of ``benchmarks.zoo`` need, once for all their processes."""

from __future__ import annotations

import contextlib
import importlib

from benchmarks.zoo_models.torchvision_operators import declare_torchvision_operators

_HEAVY = (
    "torch._dynamo",
    "torchvision",
    "timm",
    "transformers.pytorch_utils",
    "segmentation_models_pytorch",
    "onnxruntime",
    "torch.onnx._internal.exporter._core",
    "lightning_qat_exporters.fake_quant_onnx",
    "lightning_qat_exporters.cann",
    "litert_torch",
    "benchmarks.zoo_models.row",
)

declare_torchvision_operators()
for _name in _HEAVY:
    # A row that needs what is absent says so itself.
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)
