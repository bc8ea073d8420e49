"""AMCT's record file: the quantization factors of every layer, as protobuf text or binary.

The message is AMCT's ``ScaleOffsetRecord``: ``record { key: "layer" value { ... } }``, one entry
per layer in the model's order. Names, types and numbers of its fields are those of
``scale_offset_record_pytorch.proto`` in AMCT's public sources (hicann/amct, 2026-08). AMCT writes
text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]

from lightning_qat.recipe.protobuf_schema import Field, message_class

# offset_w comes once per scale_w and is always 0: weights are symmetric. The schema's other fields
# belong to other tools of AMCT (balancing, pruning, shifts): a record that has one is refused.
_MESSAGES = {
    "ScaleOffsetRecord": (Field("record", "Entry", "repeated"),),
    "Entry": (Field("key", "string", "required"), Field("value", "Factors", "required")),
    "Factors": (
        Field("scale_d", "float", "optional", 1),
        Field("offset_d", "int32", "optional", 2),
        Field("scale_w", "float", "repeated", 3),
        Field("offset_w", "int32", "repeated", 4),
        Field("act_type", "string", "optional", 11),
        Field("wts_type", "string", "optional", 12),
        Field("scale_h", "float", "optional", 21),
        Field("offset_h", "int32", "optional", 22),
        Field("scale_r", "float", "repeated", 23),
        Field("offset_r", "int32", "repeated", 24),
    ),
}
BINARY_SUFFIX = ".pb"
"""A record file of such a name is written in binary."""


@dataclass(frozen=True)
class LayerRecord:
    """The factors of one layer; every scale is a float32 value.

    Attributes:
        name: The layer's name, the entry's key.
        scale_d: Scale of the input.
        offset_d: The zero point of the input: the integer of real zero.
        scale_w: Scale of the weight, one or one per output channel, with batch
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
    return str(text_format.MessageToString(_message(records)))


def encode_record(records: Iterable[LayerRecord]) -> bytes:
    """The same message in protobuf's binary form.

    Example:
        >>> encode_record([LayerRecord("fc", 0.5, 1, (0.25,))]).hex(" ")[:47]
        '0a 20 0a 02 66 63 12 1a 0d 00 00 00 3f 10 01 1d'
    """
    return bytes(_message(records).SerializeToString())


def _message(records: Iterable[LayerRecord]) -> Any:
    message = _record_class()()
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
    return message


def read_record(path: str | Path) -> tuple[LayerRecord, ...]:
    """Read a record file.

    Args:
        path: ``ScaleOffsetRecord`` as protobuf text or binary, from our exporter or AMCT.

    Returns:
        One record per entry, in the file's order.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no such message; see ``parse_record``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There must be a record file at {str(path)!r}; no file is there.")
    data = path.read_bytes()
    message = _record_class()()
    # The first byte of a binary record is that of its first field, which is also a line feed.
    if data.startswith(b"\n"):
        try:
            message.ParseFromString(data)
        except DecodeError:
            pass
        else:
            return _records(message)
    try:
        return parse_record(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A record file must be a ScaleOffsetRecord as protobuf text or binary; {str(path)!r} "
            "is neither. Write it with the exporter or take AMCT's own."
        ) from error


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
        message: Any = text_format.Parse(text, _record_class()())
    except text_format.ParseError as error:
        raise ValueError(
            f"A record file must be a ScaleOffsetRecord in protobuf text; got {error}. "
            "Write it with the exporter or take AMCT's own."
        ) from error
    return _records(message)


def _records(message: Any) -> tuple[LayerRecord, ...]:
    _require_known("the file", message)
    records: dict[str, LayerRecord] = {}
    for entry in message.record:
        name, value = entry.key, entry.value
        _require_known(f"layer {name!r}", entry, value)
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


def _require_known(what: str, *parts: Any) -> None:
    unknown = [field.field_number for part in parts for field in UnknownFieldSet(part)]
    if unknown:
        raise ValueError(
            "A record file must hold nothing but scales, offsets and types of layers; "
            f"{what} has the fields number {unknown}, of AMCT's other tools. Write it without them."
        )


def _require_scales(name: str, field: str, scales: Sequence[float]) -> None:
    bad = [s for s in scales if not (np.isfinite(s) and s > 0)]
    if bad:
        raise ValueError(f"{field} must be positive and finite; layer {name!r} has {bad[0]!r}.")


@cache
def _record_class() -> Any:
    return message_class("lightning_qat_record", _MESSAGES)
