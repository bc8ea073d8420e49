"""JSON from elsewhere."""

import pytest

from lightning_qat.plain_data.parse_json import parse_json


def test_json_is_read_with_the_numbers_that_python_writes() -> None:
    assert parse_json('{"a": [1, 2.5, null, true], "b": Infinity}') == {
        "a": [1, 2.5, None, True],
        "b": float("inf"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 2, "a": 3}', r"a key must come once in its object; \['a'\]"),
        ("[" * 60 + "]" * 60, "nested at most 50 deep"),
        ("[" * 100_000, "nested at most 50 deep"),
        ('{"a": ' * 100_000, "nested at most 50 deep"),
        (f"[{2**63}]", "a whole number must have at most 64 bits; one has 64"),
        ("[" + "9" * 5000 + "]", "digits"),
        ("[" + "0," * 300_000 + "0]", "at most 300,000 values"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
    ],
)
def test_what_no_file_of_ours_holds_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)
