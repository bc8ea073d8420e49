"""The locked versions are those of the pins, with hashes, and name no place that they come from."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PINS = (ROOT / "constraints.txt").read_text()
LOCK = (ROOT / "requirements-dev.lock").read_text()
ENTRIES = re.findall(r"^(\S+)==(\S+?)( ; [^\\\n]*)?((?: \\\n    --hash=\S+)*)$", LOCK, re.MULTILINE)
VERSIONS = {canonicalize_name(name): version for name, version, _, _ in ENTRIES}


def test_every_line_is_an_entry_with_sha256_hashes() -> None:
    lines = [line for line in LOCK.splitlines() if line and not line.startswith("#")]
    assert len(lines) == sum(1 + hashes.count("--hash") for *_, hashes in ENTRIES)
    for name, _, _, hashes in ENTRIES:
        found = re.findall(r"--hash=sha256:([0-9a-f]{64})", hashes)
        assert found, name
        assert len(found) == hashes.count("--hash"), name


def test_no_place_is_named() -> None:
    assert "://" not in LOCK
    assert "--index-url" not in LOCK
    assert "--find-links" not in LOCK


def test_the_versions_are_those_of_the_pins() -> None:
    lines = [line.partition("#")[0].strip() for line in PINS.splitlines()]
    pins = [Requirement(line) for line in lines if line]
    assert len(pins) > 20
    different = {
        str(pin): VERSIONS[canonicalize_name(pin.name)]
        for pin in pins
        if canonicalize_name(pin.name) in VERSIONS
        and not pin.specifier.contains(VERSIONS[canonicalize_name(pin.name)])
    }
    assert not different, "make lock"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib comes with Python 3.11")
def test_every_dependency_is_locked() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        Requirement(text) for text in (*project["dependencies"], *extras["dev"], *extras["docs"])
    ]
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in VERSIONS, f"{name}: make lock"
        assert requirement.specifier.contains(VERSIONS[name]), f"{name}: make lock"
