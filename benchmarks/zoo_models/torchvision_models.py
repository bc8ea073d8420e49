"""Models of torchvision; detectors up to non-maximum suppression."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo_models.entry import Registry, Selected, images

REGISTRY = Registry("torchvision")


class RawDetector(nn.Module):
    """A detector's backbone and head: what they give for all anchors, and the anchors.

    Args:
        detector: Has ``backbone``, ``head`` and ``anchor_generator``, as torchvision's have.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector: Any = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Logits and box regressions of all anchors for images (batch, 3, height, width)."""
        features = list(self.detector.backbone(image).values())
        found = self.detector.head(features)
        return found["cls_logits"], found["bbox_regression"]


def _classifier(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        model: nn.Module = torchvision.models.get_model(
            name, weights=None, num_classes=10, **options
        )
        return model

    return build


def _segmenter(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        model = torchvision.models.get_model(
            name, weights=None, weights_backbone=None, num_classes=4
        )
        return Selected(model, ("out",))

    return build


def _detector(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return RawDetector(
            torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4)
        )

    return build


def _vit() -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64
    )
    return model


def _video(frames: int, size: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(2, 3, frames, size, size),)


REGISTRY.add(
    "googlenet", _classifier("googlenet", aux_logits=False, init_weights=False), images(64)
)
REGISTRY.add("squeezenet1_1", _classifier("squeezenet1_1"), images(64))
REGISTRY.add("shufflenet_v2_x0_5", _classifier("shufflenet_v2_x0_5"), images(64))
REGISTRY.add("mnasnet0_5", _classifier("mnasnet0_5"), images(64))
REGISTRY.add("r3d_18", _classifier("r3d_18"), _video(4, 32))
REGISTRY.add("swin_t", _classifier("swin_t"), images(56))
REGISTRY.add("swin_v2_t", _classifier("swin_v2_t"), images(64))
REGISTRY.add("swin3d_t", _classifier("swin3d_t"), _video(4, 32))
REGISTRY.add("VisionTransformer", _vit, images(32))
REGISTRY.add("lraspp_mobilenet_v3_large", _segmenter("lraspp_mobilenet_v3_large"), images(64))
REGISTRY.add("deeplabv3_resnet50", _segmenter("deeplabv3_resnet50"), images(64))
REGISTRY.add("fcn_resnet50", _segmenter("fcn_resnet50"), images(64))
REGISTRY.add("retinanet_resnet50_fpn", _detector("retinanet_resnet50_fpn"), images(64))
REGISTRY.add(
    "ssdlite320_mobilenet_v3_large", _detector("ssdlite320_mobilenet_v3_large"), images(96)
)
