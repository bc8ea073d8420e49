"""Build the documentation into ``site/``: ``make docs``, or ``python docs/build.py``.

Pages link to files of the repository (tests, examples, the changelog) as one follows them there. A
site consists of pages, so each file that is linked to becomes one, under ``source/``. Links to
what does not exist are errors, as is every warning of Zensical.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
STAGED = ROOT / "build" / "docs"
"""What Zensical reads: ``docs_dir`` of ``zensical.toml``."""

PAGES_OF_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files beside the README that are pages of the site."""

LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(#[^)\s]*)?(?=\))")
"""A target in the repository, and its anchor, in ``[text](target#anchor)``."""

PICTURES = (".svg", ".png")

LANGUAGES = {".py": "python", ".yaml": "yaml", ".c": "c", ".ipynb": "json"}


def pages() -> dict[Path, Path]:
    """Every page of the site: the file that it is written in, to its place in the site."""
    found = {ROOT / name: Path(place) for name, place in PAGES_OF_ROOT.items()}
    return found | {page: page.relative_to(DOCS) for page in sorted(DOCS.rglob("*.md"))}


def stage() -> list[str]:
    """Write what Zensical reads; the links that lead nowhere, one line each."""
    shutil.rmtree(STAGED, ignore_errors=True)
    problems: list[str] = []
    sources: set[Path] = set()
    for page, place in pages().items():
        text = page.read_text(encoding="utf-8")
        write(place, with_links_of_the_site(text, page, place, sources, problems))
    for picture in (file for file in DOCS.rglob("*") if file.suffix in PICTURES):
        (STAGED / picture.relative_to(DOCS)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, STAGED / picture.relative_to(DOCS))
    for source in sources:
        write(place_of_source(source), page_of_source(source))
    return problems


def write(place: Path, text: str) -> None:
    """Write one page below ``STAGED``."""
    file = STAGED / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def with_links_of_the_site(
    text: str, page: Path, place: Path, sources: set[Path], problems: list[str]
) -> str:
    """The text of a page, with links to files of the repository turned into links to pages.

    Args:
        text: What the page says.
        page: The file that it is written in.
        place: Where it is in the site.
        sources: Gets the files that the page links to.
        problems: Gets a line for each link that leads nowhere.
    """
    places = pages()

    def of_the_site(link: re.Match[str]) -> str:
        target = (page.parent / link[1]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            problems.append(f"{page.relative_to(ROOT)}: {link[1]} is no file of the repository")
            return link[0]
        if target in places:
            new = places[target]
        elif target.is_relative_to(DOCS) and target.suffix in PICTURES:
            new = target.relative_to(DOCS)
        else:
            sources.add(target)
            new = place_of_source(target)
        return Path(os.path.relpath(new, place.parent)).as_posix() + (link[2] or "")

    # Blocks of code hold no links.
    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if number % 2 else LINK.sub(of_the_site, part) for number, part in enumerate(parts)
    )


def place_of_source(source: Path) -> Path:
    """Where the page of a file of the repository is."""
    relative = source.relative_to(ROOT)
    return Path("source") / relative.with_name(relative.name.replace(".", "_") + ".md")


def page_of_source(source: Path) -> str:
    """A page with the text of a file, which the search leaves out."""
    name = source.relative_to(ROOT).as_posix()
    language = LANGUAGES.get(source.suffix, "text")
    text = source.read_text(encoding="utf-8")
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`{3,}", text)), default=2))
    header = f"---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n# {name}\n"
    return f"{header}\n{fence}{language}\n{text}{fence}\n"


def main() -> int:
    """Build the site; the exit status."""
    for module in ("zensical", "mkdocstrings_handlers.python"):
        if find_spec(module.split(".")[0]) is None:
            print(f'{module} is missing: pip install -c constraints.txt ".[docs]"', file=sys.stderr)
            return 2
    problems = stage()
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
