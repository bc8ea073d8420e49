"""AMCT's simple configuration, protobuf text, as plain data.

Protobuf's own text format reads it, with a schema built here: comments, optional colons, separators
and escapes mean exactly what they mean to AMCT, and unknown fields, unknown values and fields that
come twice are refused by line. Which values are allowed together is left to ``amct_config``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format  # type: ignore[import-untyped]

_PACKAGE = "lightning_qat_amct_cfg"
_TYPES = ("INT4", "INT8", "INT16")

# Name of each message, then (field, type, repeated). Text knows names only, so the numbers are
# those of the order. Source: AMCT's message AMCTRetrainConfig, without its fields for pruning.
_SCHEMA: dict[str, tuple[tuple[str, str, bool], ...]] = {
    "AMCTRetrainConfig": (
        ("batch_num", "int32", False),
        ("retrain_data_quant_config", "DataConfig", False),
        ("retrain_weight_quant_config", "WeightConfig", False),
        ("quant_skip_layers", "string", True),
        ("quant_skip_types", "string", True),
        ("skip_layers", "string", True),
        ("skip_layer_types", "string", True),
        ("override_layer_configs", "OverrideLayer", True),
        ("override_layer_types", "OverrideType", True),
    ),
    "DataConfig": (("ulq_quantize", "ULQuantize", False),),
    "ULQuantize": (
        ("clip_max_min", "ClipMaxMin", False),
        ("fixed_min", "bool", False),
        ("dst_type", "DataType", False),
    ),
    "ClipMaxMin": (("clip_max", "double", False), ("clip_min", "double", False)),
    "WeightConfig": (
        ("arq_retrain", "WeightRetrain", False),
        ("ulq_retrain", "WeightRetrain", False),
    ),
    "WeightRetrain": (("dst_type", "DataType", False), ("channel_wise", "bool", False)),
    "OverrideLayer": (
        ("layer_name", "string", False),
        ("retrain_data_quant_config", "DataConfig", False),
        ("retrain_weight_quant_config", "WeightConfig", False),
    ),
    "OverrideType": (
        ("layer_type", "string", False),
        ("retrain_data_quant_config", "DataConfig", False),
        ("retrain_weight_quant_config", "WeightConfig", False),
    ),
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
        message = text_format.Parse(text, _message_class()())
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
def _message_class() -> Any:
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto2"
    )
    types = file.enum_type.add(name="DataType")
    for number, name in enumerate(_TYPES):
        types.value.add(name=name, number=number)
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for number, (field, kind, repeated) in enumerate(fields, start=1):
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            added = message.field.add(name=field, number=number, label=label)
            if kind in _SCHEMA or kind == "DataType":
                added.type_name = f".{_PACKAGE}.{kind}"
                added.type = kinds.TYPE_MESSAGE if kind in _SCHEMA else kinds.TYPE_ENUM
            else:
                added.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
    # A pool of its own: an installed AMCT registers the same messages under its own names.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindMessageTypeByName(f"{_PACKAGE}.AMCTRetrainConfig")
    return message_factory.GetMessageClass(found)
