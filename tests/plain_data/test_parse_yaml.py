"""YAML from elsewhere: what plain YAML means stays, and nothing else comes in."""

import pytest
import yaml

from lightning_qat.plain_data.parse_yaml import parse_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bits: 8\nclip: [-1, 2.5]\nnone: ~\nflag: true\nwords: ['x', \"y\", z]\n",
        "- 1\n- - 2\n  - {a: b}\n",
        "text: |\n  two\n  lines\n",
        "numbers: [010, 0x1f, 1_000, .inf, -.inf, 1.5e+3]",
        "base: &base {bits: 4}\nsame: *base\nmore: {<<: *base, bits: 2, name: q}\n",
        "{<<: [{a: 1}, {a: 2, b: 3}], c: 1}",
        "# a comment\n--- \nkey: 'it''s'\n...\n",
    ],
)
def test_plain_yaml_means_what_pyyaml_says(text: str) -> None:
    assert parse_yaml(text) == yaml.safe_load(text)


def test_a_number_with_an_exponent_needs_no_point_as_in_lightning_cli() -> None:
    assert parse_yaml("[1e-3, -2E+4, 1e5x]") == [0.001, -20000.0, "1e5x"]


def test_a_date_is_a_text_which_json_can_hold() -> None:
    assert parse_yaml("day: 2026-08-01") == {"day": "2026-08-01"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: 8\nbits: 4\n", "line 2: a key must come once in its mapping; 'bits' comes again"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "line 4: .*'b' comes again"),
        ("a: 1\n'a': 2", "line 2: .*'a' comes again"),
        ("a: !!python/object/apply:os.system ['true']", "line 1: .*plain, without a tag"),
        ("a: !!binary aGk=", "without a tag"),
        ("a: !mine 1", "without a tag; one has '!mine'"),
        ("- &a [*a]", r"a value must not hold itself; \*a does"),
        ("- *a", r"an alias must have an anchor before it; \*a has none|undefined alias"),
        (LAUGHS, "line 6: data must have at most 300,000 values"),
        ("a: &a '" + "x" * 10**5 + "'\nb: [" + "*a, " * 200 + "]", "characters at most together"),
        ("[" * 10_000, "nested at most 50 deep"),
        ("a: &a " + "[" * 30 + "]" * 30 + "\nb: " + "[" * 30 + "*a" + "]" * 30, "50 deep"),
        ("0: {weight: {bits: 4}}", "line 1: a key must be a text; got 0. Write it in quotes: '0'"),
        ("on: 1", "got True. Write it in quotes: 'on'"),
        ("1e5: 1", "Write it in quotes: '1e5'"),
        ("? [a]\n: 1", "a key must be a text; one is a list or a mapping"),
        ("a: 0x" + "f" * 99, "at most 64 bits; one has 396"),
        ("a: " + "1" * 5000, "is no int"),
        ("a: 0b_", "'0b_' is no int"),
        ("!!int ''", "'' is no int"),
        ("!!bool maybe", "'maybe' is no bool"),
        ("<<: 3", "<< must be a mapping"),
        ("a: 1\n---\nb: 2", "line 2: a file must hold one document"),
        ("a: [", "it is no YAML"),
        ("a: \x00", "it is no YAML"),
    ],
)
def test_what_is_not_plain_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


def test_mappings_of_a_user_may_have_numbers_as_keys() -> None:
    assert parse_yaml("{0: 1.5, true: 2}", names_only=False) == {0: 1.5, True: 2}
    with pytest.raises(ValueError, match="0 comes again"):
        parse_yaml("{0: 1, 0: 2}", names_only=False)


def test_the_parser_without_libyaml_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_qat.plain_data.parse_yaml._PARSER", yaml.SafeLoader)
    assert parse_yaml("a: &x [1, {b: c}]\nd: *x\n") == {"a": [1, {"b": "c"}], "d": [1, {"b": "c"}]}
    with pytest.raises(ValueError, match="line 2: a key must come once"):
        parse_yaml("a: 1\na: 2")
    with pytest.raises(ValueError, match="nested at most 50 deep"):
        parse_yaml("[" * 10_000)
