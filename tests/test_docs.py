"""The table in docs/lightning.md names tests that exist, and leaves no file of them out."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "lightning.md"


def links() -> list[tuple[str, Path]]:
    found = re.findall(r"\[([^\]]+)\]\((\.\./[\w/]+\.py)\)", PAGE.read_text(encoding="utf-8"))
    return [(text, (PAGE.parent / target).resolve()) for text, target in found]


def test_every_row_links_to_tests_that_exist() -> None:
    tests = [(text, file) for text, file in links() if file.name.startswith("test_")]
    assert len(tests) > 100
    missing = [
        f"{file.name}: {text}"
        for text, file in tests
        if f"def test_{text.replace(' ', '_')}(" not in file.read_text(encoding="utf-8")
    ]
    assert missing == []
    for row in PAGE.read_text(encoding="utf-8").splitlines():
        if row.count(" | ") == 3 and not row.startswith("| feature"):
            assert "](../tests/" in row


def test_every_file_of_tests_is_in_the_table() -> None:
    files = {file for _, file in links()}
    # Parts of the callback that no user sees by themselves.
    parts = {"test_patch_once.py", "test_phase_tracker.py", "test_example_inputs.py"}
    found = set((ROOT / "tests/callback").glob("test_*.py"))
    assert {file.name for file in found - files} == parts
