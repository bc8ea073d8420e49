"""A record holds what a quantization can have, or is refused: every layer and field at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_qat.amct.record import format_record, parse_record, read_record
from tests.amct.test_record import RECORD, VALUE, file_of

GOOD = (
    'record { key: "fc" value { scale_d: 0.5 offset_d: -128 scale_w: 0.25 scale_w: 0.125 '
    'offset_w: 0 offset_w: 0 act_type: "INT8" wts_type: "INT8" } }'
)
RNN = GOOD.replace("act_type", "scale_h: 1.0 offset_h: 3 scale_r: 2.0 offset_r: 0 act_type")


@pytest.mark.parametrize("text", [GOOD, RNN])
def test_what_a_quantization_has_is_read(text: str) -> None:
    (entry,) = parse_record(text)
    assert (entry.scale_d, entry.offset_d, entry.scale_w) == (0.5, -128, (0.25, 0.125))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("-128", "300", r"'fc': offset_d must be in -128\.\.127 for INT8; got 300"),
        ("-128", "-129", r"offset_d must be in -128\.\.127"),
        ('"INT8" wts', '"INT4" wts', r"offset_d must be in -8\.\.7 for INT4; got -128"),
        ("0.5", "0", "'fc': scale_d must be positive and finite"),
        ("0.5", "-0.5", "scale_d must be positive"),
        ("0.5", "nan", "scale_d must be positive and finite.* got nan"),
        ("0.5", "1e400", "scale_d must be positive and finite.* got inf"),
        ("0.5", "1e-40", r"scale_d must be .*a normal float32 \(1.18e-38 or more\)"),
        ("0.5", "3e37", r"scale_d must be .*whose 255 steps stay below 3.4e\+38; got"),
        ("0.125", "1e-39", r"'fc': scale_w\[1\] must be positive"),
        ("0.125", "3e36", r"scale_w\[1\] must be .*whose 128 steps"),
        ('"INT8" wts', '"FLOAT" wts', r"act_type must be one of \['INT4', 'INT8', 'INT16'\]"),
        ('"INT8" } }', '"INT16" } }', r"wts_type must be one of \['INT4', 'INT8'\]; got 'INT16'"),
        ("offset_w: 0 off", "off", "offset_w must come once per scale_w, 2 times; got 1"),
        ("offset_w: 0 off", "offset_w: 7 off", "offset_w must be 0, for weights are symmetric"),
        ("offset_h: 3", "", "an LSTM or GRU must have scale_h, offset_h and scale_r"),
        ("scale_r: 2.0 offset_r: 0", "", "any other layer none of them; got scale_h 1.0"),
        ("scale_h: 1.0", "", "got scale_h None, offset_h 3 and 1 numbers of scale_r"),
        ("offset_h: 3", "offset_h: 128", r"offset_h must be in -128\.\.127"),
        ("scale_r: 2.0", "scale_r: 0", "scale_r must be positive"),
        ("-128", "99999999999", "in protobuf text"),
        ("0.5", "0x", "in protobuf text"),
    ],
)
def test_what_no_quantization_has_is_refused_by_layer_and_field(
    old: str, new: str, message: str
) -> None:
    text = GOOD if old in GOOD else RNN
    assert old in text
    with pytest.raises(ValueError, match=message):
        parse_record(text.replace(old, new, 1))


def test_everything_that_is_wrong_is_told_at_once() -> None:
    other = GOOD.replace("fc", "head").replace("0.5", "0").replace("0.25", "nan")
    bare = 'record { key: "stem" value { scale_w: 1 } }'
    with pytest.raises(ValueError, match="A record must be") as refused:
        parse_record(GOOD.replace("-128", "300") + GOOD + other + bare)
    for told in ("'fc': offset_d", "'fc' comes twice", "'head': scale_d", "'head': scale_w[0]"):
        assert f"layer {told}" in str(refused.value)
    assert "layer 'stem' lacks ['scale_d', 'offset_d']" in str(refused.value)


def test_of_thousands_of_problems_the_first_are_told() -> None:
    bad = GOOD.replace("-128", "300")
    with pytest.raises(ValueError, match=r"and 31 more\.$") as refused:
        parse_record("".join(bad.replace("fc", f"fc{i}") for i in range(51)))
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("content", [b"", b"# a comment\n", b"\n"])
def test_a_file_without_a_layer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "record.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"one layer at least; .*record\.txt' names none"):
        read_record(tmp_path / "record.txt")


def test_text_in_another_encoding_says_so(tmp_path: Path) -> None:
    path = tmp_path / "record.txt"
    path.write_text(format_record([RECORD]), encoding="utf-16")
    with pytest.raises(ValueError, match=r"is neither: .*it is UTF-16"):
        read_record(path)
    path.write_text(format_record([RECORD]), encoding="utf-8-sig")
    assert read_record(path) == (RECORD,)


def test_a_file_too_large_for_a_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.txt"
    with path.open("wb") as file:
        file.truncate(2**40)  # no disk is used
    with pytest.raises(ValueError, match=r"must have at most 67,108,864 bytes.*1,099,511,627,776"):
        read_record(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            file_of(VALUE.replace(b"INT16", b"\xff\xfe\xfd\xfc\xfb")),
            "UTF-8|is neither|act_type must be one of",
        ),
        (b"\n\x00", "an entry must have a key|is neither|in protobuf text"),
        (file_of(VALUE)[:-20], "is neither|in protobuf text"),
        (file_of(VALUE) * 2, "'fc' comes twice"),
    ],
)
def test_a_damaged_binary_record_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "record.pb").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_record(tmp_path / "record.pb")
