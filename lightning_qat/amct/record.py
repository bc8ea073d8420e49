"""AMCT's record file: the quantization factors of every layer, as protobuf text or binary.

The message is AMCT's ``ScaleOffsetRecord``: ``record { key: "layer" value { ... } }``, one entry
per layer in the model's order. Names, types and numbers of its fields are those of
``scale_offset_record_pytorch.proto`` in AMCT's public sources (hicann/amct, 2026-08). AMCT writes
text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]

from lightning_qat.amct.layer_record import LayerRecord, record_problems, refuse_problems
from lightning_qat.plain_data.text import decoded, read_bytes
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
_MOST_BYTES = 64 * 2**20
BINARY_SUFFIX = ".pb"
"""A record file of such a name is written in binary."""


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
        ValueError: The file is no such message, is larger than 64 MB, or names no layer; see
            ``parse_record``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There must be a record file at {str(path)!r}; no file is there.")
    data = read_bytes(path, _MOST_BYTES)
    try:
        # The first byte of a binary record is that of its first field, which is also a line feed.
        records = _parse_binary(data) if data.startswith(b"\n") else None
        if records is None:
            records = parse_record(_text(data, path))
    except ValueError as error:
        raise ValueError(f"Record file {str(path)!r}: {error}") from error
    if not records:
        raise ValueError(
            f"A record file must name one layer at least; {str(path)!r} names none. It may have "
            "been cut off: write it again."
        )
    return records


def _text(data: bytes, path: Path) -> str:
    try:
        return decoded(data, path)
    except ValueError as error:
        raise ValueError(
            f"A record file must be a ScaleOffsetRecord as protobuf text or binary; {str(path)!r} "
            f"is neither: {error} Write it with the exporter or take AMCT's own."
        ) from error


def _parse_binary(data: bytes) -> tuple[LayerRecord, ...] | None:
    """The records; ``None``: the bytes are no such message."""
    message = _record_class()()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return None
    try:
        return _records(message)
    except UnicodeDecodeError as error:
        raise ValueError("Names and types in a record file must be UTF-8; some are not.") from error


def parse_record(text: str) -> tuple[LayerRecord, ...]:
    """Read a record file's text.

    Args:
        text: Protobuf text of ``ScaleOffsetRecord``.

    Returns:
        One record per entry, in the file's order.

    Raises:
        ValueError: The text is no such message; or a layer comes twice or lacks a field, an offset
            of a weight is not 0, an offset is outside of its type's integers, a scale is no
            positive, normal float32, a type is unknown, or counts do not fit. All such places are
            named.
    """
    try:
        message: Any = text_format.Parse(text, _record_class()())
    except (text_format.ParseError, RecursionError) as error:
        raise ValueError(
            f"A record file must be a ScaleOffsetRecord in protobuf text; got {error}. "
            "Write it with the exporter or take AMCT's own."
        ) from error
    return _records(message)


def _records(message: Any) -> tuple[LayerRecord, ...]:
    problems = [*_unknown("the file", message)]
    records = []
    for entry in message.record:
        missing = [*_missing(entry)]
        problems += [*missing, *_field_problems(f"layer {entry.key!r}", entry)]
        if not missing:
            records.append(_record(entry))
    problems += record_problems(records)
    refuse_problems("A record must be of a quantized model:", problems)
    return tuple(records)


def _record(entry: Any) -> LayerRecord:
    value = entry.value
    return LayerRecord(
        name=entry.key,
        scale_d=value.scale_d,
        offset_d=value.offset_d,
        scale_w=tuple(value.scale_w),
        act_type=value.act_type or "INT8",
        wts_type=value.wts_type or "INT8",
        scale_h=value.scale_h if value.HasField("scale_h") else None,
        offset_h=value.offset_h if value.HasField("offset_h") else None,
        scale_r=tuple(value.scale_r),
    )


def _missing(entry: Any) -> Iterator[str]:
    if not entry.HasField("key"):  # in binary, where required fields may be left out
        yield "an entry must have a key, the name of its layer"
        return
    missing = [f for f in ("scale_d", "offset_d") if not entry.value.HasField(f)]
    missing += [] if entry.value.scale_w else ["scale_w"]
    if missing:
        yield f"layer {entry.key!r} lacks {missing}; it must have scale_d, offset_d and scale_w"


def _field_problems(where: str, entry: Any) -> Iterator[str]:
    """What a ``LayerRecord`` does not hold."""
    value = entry.value
    yield from _unknown(where, entry, value)
    for letter in "wr":
        scales, offsets = getattr(value, f"scale_{letter}"), getattr(value, f"offset_{letter}")
        if any(offsets):
            wrong = next(offset for offset in offsets if offset)
            yield f"{where}: offset_{letter} must be 0, for weights are symmetric; got {wrong}"
        if offsets and len(offsets) != len(scales):
            yield (
                f"{where}: offset_{letter} must come once per scale_{letter}, {len(scales)} times; "
                f"got {len(offsets)}"
            )


def _unknown(what: str, *parts: Any) -> Iterator[str]:
    unknown = [field.field_number for part in parts for field in UnknownFieldSet(part)]
    if unknown:
        yield (
            f"{what} has the fields number {unknown[:20]}, of AMCT's other tools; a record must "
            "hold nothing but scales, offsets and types of layers. Write it without them"
        )


@cache
def _record_class() -> Any:
    return message_class("lightning_qat_record", _MESSAGES)
