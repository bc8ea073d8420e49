"""AMCT's record file: the quantization factors of every layer, as protobuf text.

The message is AMCT's ``ScaleOffsetRecord``: ``record { key: "layer" value { ... } }``, one entry
per layer in the model's order. The schema is built here at run time, so that protobuf's own text
format reads and prints it; only names and types matter in text, field numbers merely order the
fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# protobuf's types are a separate package, for four names not worth a dependency.
from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
)

from lightning_qat_exporters._quantized_ops import QuantizedLayer

_PACKAGE = "lightning_qat_record"
_Field = descriptor_pb2.FieldDescriptorProto
# In AMCT's printed order. offset_w comes once per scale_w and is always 0: weights are symmetric.
_FIELDS = (
    ("scale_d", _Field.TYPE_FLOAT, False),
    ("offset_d", _Field.TYPE_INT32, False),
    ("scale_w", _Field.TYPE_FLOAT, True),
    ("offset_w", _Field.TYPE_INT32, True),
    ("act_type", _Field.TYPE_STRING, False),
    ("wts_type", _Field.TYPE_STRING, False),
    ("scale_h", _Field.TYPE_FLOAT, False),
    ("offset_h", _Field.TYPE_INT32, False),
    ("scale_r", _Field.TYPE_FLOAT, True),
    ("offset_r", _Field.TYPE_INT32, True),
)


@dataclass(frozen=True)
class LayerRecord:
    """The factors of one layer; every scale is a float32 value.

    Attributes:
        name: The layer's name, the entry's key.
        scale_d: Real size of one step of the input.
        offset_d: The integer that stands for real zero in the input.
        scale_w: Real size of one step of the weight, one or one per output channel, with batch
            norm folded.
        act_type: Type of the input's integers.
        wts_type: Type of the weight's integers.
        scale_h: For LSTM and GRU, as ``scale_d`` for the hidden state.
        offset_h: For LSTM and GRU, as ``offset_d`` for the hidden state.
        scale_r: For LSTM and GRU, as ``scale_w`` for the recurrent weight.
    """

    name: str
    scale_d: float
    offset_d: int
    scale_w: tuple[float, ...]
    act_type: str = "INT8"
    wts_type: str = "INT8"
    scale_h: float | None = None
    offset_h: int | None = None
    scale_r: tuple[float, ...] = ()


def layer_records(layers: Iterable[QuantizedLayer]) -> tuple[LayerRecord, ...]:
    """The records of the layers that ``find_quantized`` found."""
    return tuple(
        LayerRecord(
            name=layer.name,
            scale_d=float(layer.scale_d),
            offset_d=layer.offset_d,
            scale_w=tuple(map(float, layer.scale_w)),
            act_type=layer.dst_type,
            wts_type=layer.wts_type,
        )
        for layer in layers
    )


def format_record(records: Iterable[LayerRecord]) -> str:
    """Print records as AMCT does: floats as the shortest decimal that reads back as the float32.

    Example:
        >>> print(format_record([LayerRecord("fc", 0.5, -128, (0.25,))]), end="")
        record {
          key: "fc"
          value {
            scale_d: 0.5
            offset_d: -128
            scale_w: 0.25
            offset_w: 0
            act_type: "INT8"
            wts_type: "INT8"
          }
        }
    """
    message = _MESSAGE()
    for record in records:
        entry = message.record.add(key=record.name)
        value = entry.value
        value.scale_d, value.offset_d = record.scale_d, record.offset_d
        value.scale_w.extend(record.scale_w)
        value.offset_w.extend([0] * len(record.scale_w))
        value.act_type, value.wts_type = record.act_type, record.wts_type
        if record.scale_h is not None:
            value.scale_h, value.offset_h = record.scale_h, record.offset_h or 0
        value.scale_r.extend(record.scale_r)
        value.offset_r.extend([0] * len(record.scale_r))
    return str(text_format.MessageToString(message))


def parse_record(text: str) -> tuple[LayerRecord, ...]:
    """Read a record file's text.

    Args:
        text: Protobuf text of ``ScaleOffsetRecord``.

    Returns:
        One record per entry, in the file's order.

    Raises:
        ValueError: The text is no such message, a layer comes twice or lacks a field, an offset of
            a weight is not 0, or a scale is not positive and finite.
    """
    try:
        message: Any = text_format.Parse(text, _MESSAGE())
    except text_format.ParseError as error:
        raise ValueError(
            f"A record file must be a ScaleOffsetRecord in protobuf text; got {error}. "
            "Write it with the exporter or take AMCT's own."
        ) from error
    records: dict[str, LayerRecord] = {}
    for entry in message.record:
        name, value = entry.key, entry.value
        if name in records:
            raise ValueError(f"A record file must name a layer once; {name!r} comes twice.")
        missing = [f for f in ("scale_d", "offset_d") if not value.HasField(f)]
        missing += [] if value.scale_w else ["scale_w"]
        if missing:
            raise ValueError(
                f"A record must have scale_d, offset_d and scale_w; layer {name!r} lacks {missing}."
            )
        if any(value.offset_w) or any(value.offset_r):
            raise ValueError(
                f"Weights must be symmetric (offset_w and offset_r all 0); layer {name!r} is not."
            )
        hidden = value.HasField("scale_h")
        _require_scales(name, "scale_d", [value.scale_d])
        _require_scales(name, "scale_w", value.scale_w)
        _require_scales(name, "scale_h", [value.scale_h] if hidden else [])
        _require_scales(name, "scale_r", value.scale_r)
        records[name] = LayerRecord(
            name=name,
            scale_d=value.scale_d,
            offset_d=value.offset_d,
            scale_w=tuple(value.scale_w),
            act_type=value.act_type or "INT8",
            wts_type=value.wts_type or "INT8",
            scale_h=value.scale_h if hidden else None,
            offset_h=value.offset_h if hidden else None,
            scale_r=tuple(value.scale_r),
        )
    return tuple(records.values())


def _require_scales(name: str, field: str, scales: Sequence[float]) -> None:
    bad = [s for s in scales if not (np.isfinite(s) and s > 0)]
    if bad:
        raise ValueError(f"{field} must be positive and finite; layer {name!r} has {bad[0]!r}.")


def _message_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto2"
    )
    value = file.message_type.add(name="Factors")
    for number, (name, kind, repeated) in enumerate(_FIELDS, start=1):
        label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
        value.field.add(name=name, number=number, type=kind, label=label)
    entry = file.message_type.add(name="Entry")
    entry.field.add(name="key", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_REQUIRED)
    root = file.message_type.add(name="ScaleOffsetRecord")
    for message, name, kind, label in (
        (entry, "value", "Factors", _Field.LABEL_REQUIRED),
        (root, "record", "Entry", _Field.LABEL_REPEATED),
    ):
        message.field.add(
            name=name,
            number=len(message.field) + 1,
            type=_Field.TYPE_MESSAGE,
            type_name=f".{_PACKAGE}.{kind}",
            label=label,
        )
    # A pool of its own: an installed AMCT registers the same message under its own name.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    descriptor = pool.FindMessageTypeByName(f"{_PACKAGE}.ScaleOffsetRecord")
    return message_factory.GetMessageClass(descriptor)


_MESSAGE = _message_class()
