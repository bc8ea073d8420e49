"""Image classifiers of timm, at small image sizes."""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.zoo_models.entry import Registry, images

REGISTRY = Registry("timm")


def _add(name: str, size: int = 64, **options: Any) -> None:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, num_classes=10, **options)
        return model

    REGISTRY.add(name, build, images(size))


for _name in (
    "resnet18",
    "regnety_002",
    "efficientnet_lite0",
    "ghostnet_050",
    "mobilenetv3_small_050",
    "tf_mobilenetv3_small_minimal_100",
    "nf_resnet26",
    "convnext_atto",
    "convnextv2_atto",
    "densenet121",
    "mobilenetv2_100",
    "lcnet_050",
    "efficientnet_b0",
    "repvgg_a0",
    "edgenext_xx_small",
    "poolformer_s12",
    "pvt_v2_b0",
    "fastvit_t8",
    "mobilenetv4_conv_small",
    "mobileone_s0",
    "dla34",
    "mobilevit_xxs",
):
    _add(_name)
for _name in (
    "vit_tiny_patch16_224",
    "xcit_nano_12_p16_224",
    "mixer_s32_224",
    "resmlp_12_224",
    "levit_128s",
    "visformer_tiny",
    "coatnet_pico_rw_224",
):
    _add(_name, 64, img_size=64)
_add("swin_tiny_patch4_window7_224", 56, img_size=56)
_add("eva02_tiny_patch14_224", 56, img_size=56)
_add("maxvit_rmlp_pico_rw_256", 64, img_size=64)
_add("tiny_vit_5m_224", 224)
_add("botnet26t_256", 256)
_add("efficientformerv2_s0", 64, img_size=64)
