"""The tables of a page, read as a browser would without scripts."""

from __future__ import annotations

from html.parser import HTMLParser


class Parsed(HTMLParser):
    """Reads a page.

    Attributes:
        tables: Rows of cells per table, the headings first, by its number.
        text: All text outside scripts and styles.
        tags: Every element with its attributes.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._cell: list[str] | None = None
        self._hidden = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden += tag in ("script", "style")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)
        if not self._hidden:
            self.text += data

    def rows(self, *headings: str) -> list[dict[str, str]]:
        """The rows, by heading, of the first table that has these headings."""
        for head, *rows in self.tables:
            if set(headings) <= set(head):
                return [dict(zip(head, row, strict=True)) for row in rows]
        raise AssertionError(f"no table has {headings}")
