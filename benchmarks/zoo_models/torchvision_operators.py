"""Let torchvision and timm import beside a build of torch that torchvision was not compiled for.

torchvision's wheels hold operators compiled for one build of torch. Where they do not load,
``import torchvision`` fails, because it gives shape functions to operators that nobody has
declared. Declared, they may be named and not called: detectors run up to non-maximum suppression.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

from __future__ import annotations

import torch

_DECLARED: list[torch.library.Library] = []
"""A library's operators last as long as the object."""


def declare_torchvision_operators() -> None:
    """Declare the operators that ``import torchvision`` needs to know; does nothing if it has them.

    Call it before the first import of torchvision, timm or segmentation_models_pytorch.
    """
    if _DECLARED or _loads():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]
    _DECLARED.append(library)


def _loads() -> bool:
    """Whether torchvision imports as it is."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True
