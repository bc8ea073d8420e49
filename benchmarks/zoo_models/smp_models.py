"""Segmenters of segmentation_models_pytorch."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

from __future__ import annotations

from torch import nn

from benchmarks.zoo_models.entry import Registry, images

REGISTRY = Registry("smp")


def _add(name: str, kind: str, encoder: str, size: int = 64) -> None:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        model: nn.Module = getattr(smp, kind)(encoder, encoder_weights=None, classes=3)
        return model

    REGISTRY.add(name, build, images(size))


_add("unet", "Unet", "resnet18")
_add("deeplabv3plus", "DeepLabV3Plus", "resnet18")
_add("pspnet", "PSPNet", "resnet18")
_add("pan", "PAN", "resnet18", 128)
_add("upernet", "UPerNet", "resnet18")
_add("segformer", "Segformer", "mit_b0")
_add("fpn", "FPN", "mobilenet_v2")
_add("linknet", "Linknet", "resnet18")
_add("manet", "MAnet", "resnet18")
