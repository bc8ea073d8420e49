"""The table of versions, without installing any."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from reliability.matrix.__main__ import main
from reliability.matrix.environment import constraints
from reliability.matrix.parts import PARTS, paths
from reliability.matrix.results import Result, earlier, keep, table
from reliability.matrix.rows import ROWS, Row

ROOT = Path(__file__).parents[2]


def requirements() -> dict[str, Requirement]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["cli"]]
    return {r.name.lower(): r for r in map(Requirement, lines)}


def pins(row: Row) -> dict[str, str]:
    return dict(pin.lower().split("==") for pin in row.pins)


def test_every_row_has_a_name_and_tests_that_exist() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.parts
        assert set(row.parts) <= PARTS.keys()
        assert [path for path in paths(row.parts) if not (ROOT / path).exists()] == []


def test_every_lower_bound_is_tried_and_every_pin_is_within_the_bounds() -> None:
    bounds = requirements()
    oldest = pins(next(row for row in ROWS if row.name == "oldest"))
    oldest |= pins(next(row for row in ROWS if row.name == "oldest but for torch"))
    for name, required in bounds.items():
        lower = next(s.version for s in required.specifier if s.operator == ">=")
        tried = oldest[name]
        assert tried == lower or tried.startswith(f"{lower}."), name
    for row in ROWS:
        for name, version in pins(row).items():
            if name in bounds:
                assert bounds[name].specifier.contains(version), (row.name, name)


def test_the_other_packages_of_a_row_are_the_development_pins() -> None:
    row = next(row for row in ROWS if row.name == "onnx 1.17.0, onnxruntime 1.22.0")
    lines = constraints(row)
    assert any(line.startswith("lightning==") for line in lines)
    assert any(line.startswith("onnx-ir==") for line in lines)
    assert not any(re.match(r"onnx(runtime)?==", line) for line in lines)
    assert constraints(Row("newest", constrained=False)) == []


def test_results_are_kept_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    keep(Result("a", "state", {"torch": "2.13.0"}, passed=3, skipped=1, seconds=2), path)
    keep(Result("b", "state", not_here="not here: no python3.99"), path)
    keep(Result("a", "state", {"torch": "2.13.0"}, passed=2, failed=["t::x"], seconds=2), path)
    results = earlier(path)
    assert list(results) == ["a", "b"]
    assert not results["a"].good
    lines = table(results.values()).splitlines()
    assert lines[2].startswith("| a | 1 failed, 2 passed | 2.13.0 | ")
    assert lines[3].startswith("| b | not here: no python3.99 | ")


def test_a_workflow_gets_every_row_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--github"]) == 0
    whole, parts = capsys.readouterr().out.splitlines()
    assert whole.startswith('whole=[{"name": "pins", "python": "3.11"')
    assert parts.startswith('parts=[{"name": ')
    assert (whole + parts).count('"name"') == len(ROWS)


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rows", "torch 0.1"])
    assert "--list shows the names" in capsys.readouterr().err
