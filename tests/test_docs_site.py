"""The documentation: links that lead somewhere, public names that have a place, a strict build."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lightning_qat
import lightning_qat_exporters

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``docs/build.py``, which is a script, with a folder of its own."""
    found = load("build")
    monkeypatch.setattr(found, "STAGED", tmp_path / "staged")
    return found


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_link_of_every_page_leads_to_a_file(build: ModuleType) -> None:
    assert build.stage() == []


def test_links_of_the_readme_lead_to_files(build: ModuleType) -> None:
    readme = ROOT / "README.md"
    problems: list[str] = []
    text = readme.read_text(encoding="utf-8")
    build.with_links_of_the_site(text, readme, Path("readme.md"), set(), problems)
    assert problems == []


def test_a_link_that_leads_nowhere_is_named(build: ModuleType) -> None:
    page, problems = ROOT / "docs" / "index.md", []  # type: ignore[var-annotated]
    for wrong in ("nowhere.md", "../tests/nowhere.py", "pictures/nowhere.svg", "../../outside.md"):
        build.with_links_of_the_site(
            f"see [this]({wrong}) and [that](https://example.org)",
            page,
            Path("index.md"),
            set(),
            problems,
        )
    assert [line.split(": ")[1].split()[0] for line in problems] == [
        "nowhere.md",
        "../tests/nowhere.py",
        "pictures/nowhere.svg",
        "../../outside.md",
    ]


def test_a_linked_file_of_the_repository_is_a_page(build: ModuleType) -> None:
    sources: set[Path] = set()
    text = "[a test](../../tests/test_docs.py#L1) and `[code](x.md)`\n\n```\n[b](c.md)\n```"
    page, place = ROOT / "docs/migrate/amct.md", Path("migrate/amct.md")
    problems: list[str] = []
    found = build.with_links_of_the_site(text, page, place, sources, problems)
    assert "(../source/tests/test_docs_py.md#L1)" in found
    assert "```\n[b](c.md)\n```" in found
    assert sources == {ROOT / "tests/test_docs.py"}
    written = build.page_of_source(ROOT / "tests/test_docs.py")
    assert "# tests/test_docs.py" in written
    assert "```python\n" in written


def test_every_page_is_in_the_navigation(build: ModuleType) -> None:
    navigation = re.findall(r'"([\w./-]+\.md)"', (ROOT / "zensical.toml").read_text())
    assert sorted(navigation) == sorted(place.as_posix() for place in build.pages().values())


def test_every_public_name_is_in_the_reference() -> None:
    pages = (ROOT / "docs" / "api").glob("*.md")
    documented = {
        line.rpartition(".")[2]
        for page in pages
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("::: ")
    }
    public = {*lightning_qat.__all__, *lightning_qat_exporters.__all__}
    assert public - documented == set()


def test_the_readme_is_read_in_two_minutes() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert {"make demo", "make test"} <= {line.partition("  ")[0] for line in lines}


def test_docstrings_have_sections_of_examples() -> None:
    pytest.importorskip("griffe", reason='griffe is missing: pip install ".[docs]"')
    as_sections = load("docstrings").as_sections
    assert as_sections("Adds.\n\nExample:\n    >>> add(1, 1)\n    2") == (
        "Adds.\n\nExamples:\n    >>> add(1, 1)\n    2"
    )
    assert as_sections("Adds.\n\nExample::\n\n    add(1, 1)\n") == (
        "Adds.\n\nExamples:\n    ```python\n    add(1, 1)\n    ```\n"
    )


@pytest.mark.parametrize("module", ["zensical", "mkdocstrings"])
def test_the_tools_of_the_site_are_asked_for(module: str) -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf'^docs = \[.*"{module}', pyproject, flags=re.MULTILINE)


def test_the_site_is_built_without_a_warning() -> None:
    for module in ("zensical", "mkdocstrings"):
        pytest.importorskip(module, reason=f'{module} is missing: pip install ".[docs]"')
    built = subprocess.run(
        [sys.executable, "docs/build.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "No issues found" in built.stdout + built.stderr
    assert (ROOT / "site" / "quickstart" / "index.html").is_file()
