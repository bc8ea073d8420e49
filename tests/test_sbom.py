"""The wheel carries a bill of materials that says of every dependency what pyproject.toml says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel")
if sys.version_info < (3, 11):
    pytest.skip("tomllib comes with Python 3.11", allow_module_level=True)
import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
BUILD = "from hatchling.build import build_wheel; print(build_wheel('dist'))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built without a network of a copy of what it needs."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in ("lightning_qat", "exporters/lightning_qat_exporters"):
        (source / package).mkdir(parents=True)
        (source / package / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (source / "dist").iterdir()] == [done.stdout.strip()]
    return source / "dist" / done.stdout.strip()


@pytest.fixture(scope="module")
def bill(wheel: Path) -> dict[str, Any]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if ".dist-info/sboms/" in n]
        assert name.endswith("/lightning-qat.cdx.json")
        found: dict[str, Any] = json.loads(archive.read(name))
    return found


def test_it_names_the_package_and_its_version(bill: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    component = bill["metadata"]["component"]
    assert (component["name"], component["version"]) == (project["name"], project["version"])
    assert component["purl"] == f"pkg:pypi/{project['name']}@{project['version']}"


def test_it_says_of_each_dependency_what_pyproject_says(bill: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {"": project["dependencies"], **project["optional-dependencies"]}
    expected = {
        (f"lightning-qat:requires:{extra}".rstrip(":"), Requirement(text))
        for extra, texts in extras.items()
        for text in texts
    }
    found = {
        (entry["name"], Requirement(entry["value"]))
        for component in bill["components"]
        for entry in component["properties"]
    }
    assert found == expected
    required = {c["bom-ref"] for c in bill["components"] if c["scope"] == "required"}
    assert {*bill["dependencies"][0]["dependsOn"]} == required
    assert len(required) == len({Requirement(text).name for text in project["dependencies"]})


def test_it_is_valid_cyclonedx(bill: dict[str, Any]) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json", reason="pip-audit brings it")
    schema = pytest.importorskip("cyclonedx.schema")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    pytest.importorskip("jsonschema")
    assert validator.validate_str(json.dumps(bill)) is None
