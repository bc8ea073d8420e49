"""AMCT's simple configuration, protobuf text, as plain data.

Protobuf's own text format reads it, with AMCT's schema: comments, optional colons, separators
and escapes mean exactly what they mean to AMCT, and unknown fields, unknown values and fields that
come twice are refused by line. Which values are allowed together is left to ``amct_config``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]

from lightning_qat.recipe.protobuf_schema import Field, message_class

_PACKAGE = "lightning_qat_amct_cfg"
_ENUMS = {"DataType": ("INT4", "INT8", "INT16")}
_QUANT_CONFIGS = (
    Field("retrain_data_quant_config", "DataConfig"),
    Field("retrain_weight_quant_config", "WeightConfig"),
)
# Text has names only, so fields are numbered by position. Source: AMCT's message
# AMCTRetrainConfig, without its fields for pruning.
_MESSAGES = {
    "AMCTRetrainConfig": (
        Field("batch_num", "int32"),
        *_QUANT_CONFIGS,
        Field("quant_skip_layers", "string", "repeated"),
        Field("quant_skip_types", "string", "repeated"),
        Field("skip_layers", "string", "repeated"),
        Field("skip_layer_types", "string", "repeated"),
        Field("override_layer_configs", "OverrideLayer", "repeated"),
        Field("override_layer_types", "OverrideType", "repeated"),
    ),
    "DataConfig": (Field("ulq_quantize", "ULQuantize"),),
    "ULQuantize": (
        Field("clip_max_min", "ClipMaxMin"),
        Field("fixed_min", "bool"),
        Field("dst_type", "DataType"),
    ),
    "ClipMaxMin": (Field("clip_max", "double"), Field("clip_min", "double")),
    "WeightConfig": (
        Field("arq_retrain", "WeightRetrain"),
        Field("ulq_retrain", "WeightRetrain"),
    ),
    "WeightRetrain": (Field("dst_type", "DataType"), Field("channel_wise", "bool")),
    "OverrideLayer": (Field("layer_name", "string"), *_QUANT_CONFIGS),
    "OverrideType": (Field("layer_type", "string"), *_QUANT_CONFIGS),
}


def parse_cfg(text: str) -> dict[str, Any]:
    """Read a simple configuration.

    Args:
        text: Protobuf text of ``AMCTRetrainConfig``.

    Returns:
        The fields that are set, nested as in the text; types are names such as ``"INT8"``.

    Raises:
        ValueError: It is no such text; the message has line and column.

    Example:
        >>> parse_cfg('batch_num: 2 retrain_weight_quant_config { arq_retrain { dst_type: INT4 } }')
        {'batch_num': 2, 'retrain_weight_quant_config': {'arq_retrain': {'dst_type': 'INT4'}}}
    """
    try:
        message = text_format.Parse(text, _config_class()())
    except text_format.ParseError as error:
        reason = str(error).replace(f"{_PACKAGE}.", "")
        raise ValueError(
            f"a simple configuration must be an AMCTRetrainConfig in protobuf text; got {reason}"
        ) from error
    return _plain(message)


def _plain(message: Any) -> dict[str, Any]:
    values = {}
    for field, value in message.ListFields():
        if field.type == field.TYPE_ENUM:
            value = field.enum_type.values_by_number[value].name
        elif field.type == field.TYPE_MESSAGE:
            several = not hasattr(value, "ListFields")
            value = [_plain(v) for v in value] if several else _plain(value)
        elif not isinstance(value, str | int | float | bool):
            value = list(value)
        values[field.name] = value
    return values


@cache
def _config_class() -> Any:
    return message_class(_PACKAGE, _MESSAGES, _ENUMS)
