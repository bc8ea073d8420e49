"""The shape of plain data, said as a type."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from typing_extensions import TypedDict

from lightning_qat.plain_data.shape import as_shape, shape_problems


class Further(TypedDict, total=False):
    note: str | None


class Row(Further):
    name: str
    bits: int
    value: float | Literal["inf"]
    pairs: list[tuple[int, str]]


ROW: Row = {"name": "conv", "bits": 8, "value": 1, "pairs": [[1, "a"]]}  # type: ignore[list-item]


@pytest.mark.parametrize("change", [{}, {"value": "inf"}, {"note": None}, {"more": [1]}])
def test_a_value_of_the_shape_is_given_back(change: dict[str, Any]) -> None:
    value = {**ROW, **change}
    assert as_shape(value, Row, "a row") is value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "it must be a mapping; got []"),
        ({**ROW, "name": 3}, "['name'] must be a text; got 3"),
        ({**ROW, "bits": True}, "['bits'] must be int; got True"),
        ({**ROW, "bits": 8.0}, "['bits'] must be int; got 8.0"),
        ({**ROW, "value": "nan"}, "['value'] must be float or 'inf'; got 'nan'"),
        ({**ROW, "note": 1}, "['note'] must be a text or null; got 1"),
        ({**ROW, "pairs": {}}, "['pairs'] must be a list; got {}"),
        ({**ROW, "pairs": [[1]]}, "['pairs'][0] must be a list of 2; got [1]"),
        ({**ROW, "pairs": [[1, "a"], ["b", "a"]]}, "['pairs'][1][0] must be int; got 'b'"),
        ({"name": "conv", "bits": 8, "value": 1}, "it must have the key 'pairs'"),
    ],
)
def test_another_shape_is_named_with_its_place(value: object, message: str) -> None:
    assert [*shape_problems(value, Row)] == [message]


def test_all_places_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"a row must have.*\['a'\] must be int.*\['b'\] must be"):
        as_shape({"a": "x", "b": None}, dict[str, int], "a row")


def test_of_several_shapes_the_one_of_the_same_kind_says_what_is_wrong() -> None:
    assert [*shape_problems({"a": 1}, dict[str, str] | str | None)] == [
        "['a'] must be a text; got 1"
    ]
