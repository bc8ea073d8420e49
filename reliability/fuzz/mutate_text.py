"""Break text whose structure is in its lines and brackets: YAML, protobuf text."""

import json
import random
from typing import Any

import yaml

from reliability.fuzz.mutate_bytes import mutate_bytes
from reliability.fuzz.mutate_plain import mutate_plain

WORDS = (
    *("!!python/object/apply:os.system ['true']", "!!binary aGk=", "!!int ''", "!x ", "&a ", "*a"),
    *("&a [*a]", "<<: ", "<<: *a", "? ", ": ", "- ", "---\n", "...\n", "%YAML 9.9\n", "| \n", "# "),
    *("{", "}", "[", "]", "<", ">", '"', "'", ",", ";", ":", "\t", "\n", "\r", "\x00", "\ufeff"),
    *("[" * 60, "{a: " * 60, "{" * 2000, "a{" * 200, "[type.googleapis.com/x.Y] {}", "\\400", "é☃"),
    *("0: 1\n", "on", "null", "~", "2026-08-01", "1:30", ".nan", "-.inf", "INT4", "INT16", "true"),
)
"""What a parser may stumble over."""

NUMBERS = (
    *("0", "-0", "1", "-1", "2", "3", "127", "128", "-128", "-129", "255", "32767", "-32768"),
    *("2147483647", "2147483648", "9223372036854775808", "1" * 5000, "0x" + "f" * 99, "010"),
    *("0.0", "0.1", "1e-3", "1e-38", "1.1754944e-38", "1.1754942e-38", "1e-40", "1e-45", "1e-46"),
    *("3e38", "3.4028235e38", "3.5e38", "1e39", "1e400", "inf", "-inf", "nan", "1.0000001"),
)
"""Where types and ranges end, those of float32 among them."""


def mutate_text(content: bytes, generator: random.Random) -> bytes:
    """Change lines, words and numbers at one to four places; now and then bytes.

    >>> mutate_text(b"a: 1", random.Random(1)) == mutate_text(b"a: 1", random.Random(1))
    True
    """
    if generator.random() < 0.1:
        return mutate_bytes(content, generator)
    text = content.decode("utf-8", errors="replace")
    for _ in range(generator.choice((1, 1, 1, 2, 4))):
        text = generator.choice((_line, _line, _word, _number, _number))(text, generator)
    return text.encode()


def mutate_json(content: bytes, generator: random.Random) -> bytes:
    """Change the tree of a JSON file, now and then its text."""
    if generator.random() < 0.2:
        return mutate_text(content, generator)
    try:
        return json.dumps(mutate_plain(json.loads(content), generator)).encode()
    except RecursionError:  # what was nested is nested again
        return b"[" * 5000 + content


def mutate_yaml(content: bytes, generator: random.Random) -> bytes:
    """Change the tree of a YAML file, or its text."""
    if generator.random() < 0.4:
        return mutate_text(content, generator)
    try:
        tree: Any = mutate_plain(yaml.safe_load(content), generator)
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()
    except RecursionError:  # what is nested so deep cannot be written by PyYAML
        return b"[" * generator.choice((60, 500, 5000)) + content


def _line(text: str, generator: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    if not lines:
        return text
    place, other = generator.randrange(len(lines)), generator.randrange(len(lines))
    choice = generator.randrange(5)
    if choice == 0:
        del lines[place]
    elif choice == 1:  # the same key again
        lines.insert(other, lines[place])
    elif choice == 2:
        lines[place], lines[other] = lines[other], lines[place]
    elif choice == 3:
        lines[place] = " " * generator.randrange(4) + lines[place].lstrip()
    else:
        lines[place:place] = lines[place : place + 8] * generator.choice((1, 2, 50))
    return "".join(lines)


def _word(text: str, generator: random.Random) -> str:
    place = generator.randrange(len(text) + 1)
    cut = generator.choice((0, 0, 1, 5))
    return text[:place] + generator.choice(WORDS) + text[place + cut :]


def _number(text: str, generator: random.Random) -> str:
    digits = [place for place, letter in enumerate(text) if letter.isdigit()]
    if not digits:
        return _word(text, generator)
    begin = end = generator.choice(digits)
    while begin and text[begin - 1] in "0123456789.e+-":
        begin -= 1
    while end < len(text) and text[end] in "0123456789.e+-":
        end += 1
    return text[:begin] + generator.choice(NUMBERS) + text[end:]
