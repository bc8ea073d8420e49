"""Transformers and sequence models of Hugging Face, configured tiny."""

# mypy: disable-error-code="arg-type,misc"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.zoo_models.entry import Inputs, Registry, Selected, tokens

REGISTRY = Registry("transformers")
_WORDS, _LENGTH = 64, 12
_SMALL: dict[str, Any] = {
    "vocab_size": _WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def _model(kind: str, config: str, output: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**options)
        return Selected(getattr(transformers, kind)(made), (output,))

    return build


def _text(mask: bool = True, **more: Callable[[], Any]) -> Callable[[], Inputs]:
    """Tokens, and a mask that hides the end of the last sequence."""

    def inputs() -> Inputs:
        found: dict[str, Any] = {"input_ids": tokens(_WORDS, _LENGTH)}
        if mask:
            hidden = torch.ones(2, _LENGTH, dtype=torch.int64)
            hidden[-1, -3:] = 0
            found["attention_mask"] = hidden
        return found | {name: make() for name, make in more.items()}

    return inputs


def _pixels(size: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


_LOGITS = "logits"
_ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": _WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_DECODER_INPUT: dict[str, Callable[[], Any]] = {"decoder_input_ids": lambda: tokens(_WORDS, 6)}

REGISTRY.add("bert", _model("BertForMaskedLM", "BertConfig", _LOGITS, **_SMALL), _text())
REGISTRY.add(
    "distilbert",
    _model(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        _LOGITS,
        **{"vocab_size": _WORDS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    _text(),
)
REGISTRY.add(
    "mobilebert",
    _model(
        "MobileBertForSequenceClassification",
        "MobileBertConfig",
        _LOGITS,
        **{**_SMALL, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    _text(),
)
REGISTRY.add("roberta", _model("RobertaForMaskedLM", "RobertaConfig", _LOGITS, **_SMALL), _text())
REGISTRY.add(
    "electra",
    _model("ElectraForSequenceClassification", "ElectraConfig", _LOGITS, **_SMALL),
    _text(),
)
REGISTRY.add(
    "albert",
    _model("AlbertForMaskedLM", "AlbertConfig", _LOGITS, **{**_SMALL, "embedding_size": 16}),
    _text(),
)
REGISTRY.add(
    "deberta_v2",
    _model(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        _LOGITS,
        **{**_SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    _text(),
)
REGISTRY.add(
    "gpt2",
    _model(
        "GPT2LMHeadModel",
        "GPT2Config",
        _LOGITS,
        **{"vocab_size": _WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        use_cache=False,
    ),
    _text(),
)
for _name, _kind, _config in (
    ("llama", "LlamaForCausalLM", "LlamaConfig"),
    ("qwen3", "Qwen3ForCausalLM", "Qwen3Config"),
    ("mistral", "MistralForCausalLM", "MistralConfig"),
    ("gemma2", "Gemma2ForCausalLM", "Gemma2Config"),
):
    REGISTRY.add(
        _name,
        _model(
            _kind,
            _config,
            _LOGITS,
            **_SMALL,
            num_key_value_heads=2,
            head_dim=8,
            use_cache=False,
            pad_token_id=0,
        ),
        _text(),
    )
REGISTRY.add(
    "gpt_neox",
    _model("GPTNeoXForCausalLM", "GPTNeoXConfig", _LOGITS, **_SMALL, use_cache=False),
    _text(),
)
REGISTRY.add(
    "mamba",
    _model(
        "MambaForCausalLM",
        "MambaConfig",
        _LOGITS,
        **{"vocab_size": _WORDS, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
        use_cache=False,
    ),
    _text(mask=False),
)
REGISTRY.add(
    "t5",
    _model(
        "T5ForConditionalGeneration",
        "T5Config",
        _LOGITS,
        **{"vocab_size": _WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64},
        **{"num_layers": 2, "num_heads": 4, "use_cache": False},
    ),
    _text(True, **_DECODER_INPUT),
)
REGISTRY.add(
    "bart",
    _model(
        "BartForConditionalGeneration", "BartConfig", _LOGITS, **_ENCODER_DECODER, use_cache=False
    ),
    _text(True, **_DECODER_INPUT),
)
REGISTRY.add(
    "whisper",
    _model(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _LOGITS,
        **_ENCODER_DECODER,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
    ),
    lambda: {
        "input_features": torch.randn(2, 16, 40),
        "decoder_input_ids": tokens(_WORDS, 6),
    },
)
_AUDIO: dict[str, Any] = {
    "vocab_size": 32,
    **_VISION,
    "conv_dim": (32, 32),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    # Masks of random places are training's alone.
    "mask_time_prob": 0.0,
}
for _name, _kind, _config in (
    ("wav2vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config"),
    ("hubert", "HubertForCTC", "HubertConfig"),
):
    REGISTRY.add(
        _name,
        _model(_kind, _config, _LOGITS, **_AUDIO),
        lambda: {"input_values": torch.randn(2, 800)},
    )
for _name, _kind, _config in (
    ("vit", "ViTForImageClassification", "ViTConfig"),
    ("dinov2", "Dinov2ForImageClassification", "Dinov2Config"),
    ("deit", "DeiTForImageClassification", "DeiTConfig"),
):
    REGISTRY.add(
        _name,
        _model(_kind, _config, _LOGITS, **_VISION, image_size=32, patch_size=8),
        _pixels(32),
    )
REGISTRY.add(
    "yolos",
    _model(
        "YolosForObjectDetection",
        "YolosConfig",
        _LOGITS,
        **_VISION,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=5,
    ),
    _pixels(32),
)
REGISTRY.add(
    "detr",
    _model(
        "DetrForObjectDetection",
        "DetrConfig",
        _LOGITS,
        **{name: size for name, size in _ENCODER_DECODER.items() if name != "vocab_size"},
        num_queries=5,
        use_timm_backbone=True,
        backbone="resnet18",
        use_pretrained_backbone=False,
        backbone_config=None,
    ),
    _pixels(64),
)
REGISTRY.add(
    "segformer",
    _model(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        _LOGITS,
        **{"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16},
        num_attention_heads=[1, 2, 3, 4],
    ),
    _pixels(64),
)
REGISTRY.add(
    "mobilevit",
    _model(
        "MobileViTForImageClassification",
        "MobileViTConfig",
        _LOGITS,
        **{"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64]},
        image_size=64,
    ),
    _pixels(64),
)
