"""Build a protobuf message class at run time, from a schema that is written in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

_Proto = descriptor_pb2.FieldDescriptorProto


class Field(NamedTuple):
    """A field of a message.

    Attributes:
        name: Its name.
        type: A scalar type of protobuf such as ``int32``, or a message or an enum of the schema.
        label: How often it comes.
        number: Its number in binary files; 0: its position in the message, from 1.
    """

    name: str
    type: str
    label: Literal["optional", "required", "repeated"] = "optional"
    number: int = 0


def message_class(
    package: str,
    messages: Mapping[str, Sequence[Field]],
    enums: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """The class of the first message of a ``proto2`` schema.

    Args:
        package: The schema's package, which qualifies names in protobuf's error messages.
        messages: The fields of every message.
        enums: The values of every enum, numbered from 0.

    Example:
        >>> pair = message_class("example", {"Pair": [Field("x", "int32"), Field("y", "int32")]})
        >>> pair(x=1, y=2).SerializeToString().hex()
        '08011002'
    """
    enums = enums or {}
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{package}.proto", package=package, syntax="proto2"
    )
    for name, values in enums.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for position, field in enumerate(fields, start=1):
            added = message.field.add(
                name=field.name,
                number=field.number or position,
                label=_Proto.Label.Value(f"LABEL_{field.label.upper()}"),
            )
            if field.type in messages or field.type in enums:
                added.type = _Proto.TYPE_MESSAGE if field.type in messages else _Proto.TYPE_ENUM
                added.type_name = f".{package}.{field.type}"
            else:
                added.type = _Proto.Type.Value(f"TYPE_{field.type.upper()}")
    # A pool of its own: an installed AMCT registers the same messages under its own names.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName(f"{package}.{next(iter(messages))}")
    )
