"""Break a protobuf message: fields get other values, elements go, come twice or change places."""

import random
from typing import Any, TypeAlias

from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import Message  # type: ignore[import-untyped]

from reliability.fuzz.mutate_bytes import mutate_bytes

Place: TypeAlias = tuple[Message, Any]
"""A message and the descriptor of one of its fields."""

INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    127,
    128,
    255,
    2**15,
    2**31 - 1,
    -(2**31),
    2**31,
    2**33,
    2**63 - 1,
    -(2**63),
)
FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-45,
    1e-39,
    3.4e38,
    float("inf"),
    float("-inf"),
    float("nan"),
)
STRINGS = (
    "",
    " ",
    "x",
    "Conv",
    "Add",
    "QuantizeLinear",
    "If",
    "NoSuchOp",
    "ai.onnx",
    "axis",
    "é",
    "a" * 5000,
)
INTEGER_LIMITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def mutate_protobuf(message: Message, generator: random.Random) -> None:
    """Change one to four fields of a message, or of the messages in it, in place."""
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        places = _places(message)
        holder, field = generator.choice(places)
        if field.is_repeated:
            _change_elements(holder, field, places, generator)
        else:
            _change_field(holder, field, places, generator)


def _places(message: Message) -> list[Place]:
    """Return the fields that are set here and in inner messages, and one more of each message."""
    places: list[Place] = []
    todo = [message]
    while todo:
        holder = todo.pop()
        for field, value in holder.ListFields():
            places.append((holder, field))
            if field.message_type is not None:
                todo.extend(value if field.is_repeated else [value])
        # A field that is not set: which one follows from what is, so that inputs repeat.
        fields = holder.DESCRIPTOR.fields
        places.append((holder, fields[len(places) % len(fields)]))
    return places


def _change_elements(
    holder: Message,
    field: Any,
    places: list[Place],
    generator: random.Random,
) -> None:
    elements = getattr(holder, field.name)
    count = len(elements)
    choice = generator.randrange(6)
    if field.message_type is not None:
        if choice == 0 or count == 0:
            elements.add()
        elif choice == 1:
            holder.ClearField(field.name)
        elif choice == 2:
            del elements[generator.randrange(count)]
        elif choice == 3:
            elements.add().CopyFrom(elements[generator.randrange(count)])
        else:
            first, second = (elements[generator.randrange(count)] for _ in range(2))
            kept = type(first)()
            kept.CopyFrom(first)
            first.CopyFrom(second)
            second.CopyFrom(kept)
        return
    values = list(elements)
    if choice == 0 or count == 0:
        values.append(_odd_value(field, None, places, generator))
    elif choice == 1:
        values = []
    elif choice == 2:
        del values[generator.randrange(count)]
    elif choice == 3:
        values.insert(generator.randrange(count), values[generator.randrange(count)])
    else:
        place = generator.randrange(count)
        values[place] = _odd_value(field, values[place], places, generator)
    holder.ClearField(field.name)
    getattr(holder, field.name).extend(values)


def _change_field(
    holder: Message,
    field: Any,
    places: list[Place],
    generator: random.Random,
) -> None:
    if generator.random() < 0.2:
        holder.ClearField(field.name)
        return
    if field.message_type is None:
        value = _odd_value(field, getattr(holder, field.name), places, generator)
        setattr(holder, field.name, value)
        return
    same_kind = [
        getattr(other, f.name)
        for other, f in places
        if f.message_type is field.message_type and not f.is_repeated
    ]
    part = getattr(holder, field.name)
    part.SetInParent()
    if same_kind:
        # A message that holds this one, copied into it, would never end.
        kept = type(part)()
        kept.CopyFrom(generator.choice(same_kind))
        part.CopyFrom(kept)


def _odd_value(
    field: Any,
    value: Any,
    places: list[Place],
    generator: random.Random,
) -> Any:
    """Return another value of the field's type."""
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_ENUM:  # proto2 takes no number beside those it knows
        return generator.choice([known.number for known in field.enum_type.values])
    if kind in INTEGER_LIMITS:
        low, high = INTEGER_LIMITS[kind]
        number = generator.choice(
            (*INTEGERS, (value or 0) + 1, (value or 0) - 1, generator.randrange(30))
        )
        return min(max(int(number), low), high)
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return generator.choice((*FLOATS, -(value or 0.0), (value or 0.0) * 1e-3))
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return not value
    if field.type == FieldDescriptor.TYPE_BYTES:
        return mutate_bytes(value or b"", generator) if generator.random() < 0.7 else b""
    return _odd_string(places, generator)


def _odd_string(places: list[Place], generator: random.Random) -> str:
    """Return a string of the message, which joins or parts what names join, or a foreign one."""
    holder, field = generator.choice(places)
    if (
        field.cpp_type == FieldDescriptor.CPPTYPE_STRING
        and field.type != FieldDescriptor.TYPE_BYTES
    ):
        value = getattr(holder, field.name)
        if field.is_repeated:
            value = generator.choice(value) if len(value) else ""
        return str(value)
    return generator.choice(STRINGS)
