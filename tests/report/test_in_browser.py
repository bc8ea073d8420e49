"""The page in Chromium: it opens, sorts, filters and zooms, and asks the network for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_qat.report.collect import collect
from lightning_qat.report.data import Arrow, Box, Plan, ReportData
from lightning_qat.report.folder import read_manifest
from lightning_qat.report.page import render
from tests.report.browser import Page, browser, executable
from tests.report.conftest import Exported

LAYERS = 200


@pytest.fixture(scope="module")
def data(exported: Exported) -> ReportData:
    manifest = read_manifest(exported.folder)
    return collect(exported.model, manifest, exported.folder, "net", compare=False)


@pytest.fixture(scope="module")
def large(data: ReportData) -> str:
    """The page of a network of 200 layers, each with a histogram of 64 different bars."""
    histogram = data.tensors[0].histogram
    assert histogram is not None
    histogram = replace(histogram, counts=tuple((37 * n) ** 2 % 1000 for n in range(64)))
    tensors = tuple(
        replace(data.tensors[0], name=f"stage.{n}.conv.input", histogram=histogram, scale=n + 1.0)
        for n in range(LAYERS)
    )
    layers = tuple(
        replace(data.layers[0], name=f"stage.{n}.conv", input=tensor, histogram=histogram)
        for n, tensor in enumerate(tensors)
    )
    boxes = [Box(layer.name, "conv2d", "integer", n) for n, layer in enumerate(layers)]
    arrows = [Arrow(n, n + 1, tensor.name, 8) for n, tensor in enumerate(tensors[:-1])]
    shortcuts = [Arrow(n, n + 2, tensors[n].name, 8) for n in range(0, LAYERS - 2, 2)]
    plan = Plan(tuple(boxes), (*arrows, *shortcuts))
    return render(replace(data, layers=layers, tensors=tensors, plan=plan))


def test_a_network_of_two_hundred_layers_is_small(large: str) -> None:
    assert len(large.encode()) < 1.5e6


@pytest.fixture(scope="module")
def page(large: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if executable() is None:
        pytest.skip("no Chromium; Debian has it: apt-get install chromium")
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(large, encoding="utf-8")
    with browser() as page:
        page.look(1280)
        page.send("Performance.enable", timeDomain="threadTicks")
        page.open(path)
        yield page


def column(page: Page, table: str, number: int) -> list[str]:
    found = page.run(
        f"[...document.querySelectorAll('#{table} tbody tr')].filter(row => !row.hidden)"
        f".map(row => row.cells[{number}].textContent)"
    )
    assert isinstance(found, list)
    return found


def test_it_opens_without_errors_and_without_the_network(page: Page) -> None:
    assert page.errors == []
    assert page.run("document.title") == "net: quantization report"


def test_it_takes_little_of_a_processor_to_open(page: Page) -> None:
    metrics = {m["name"]: m["value"] for m in page.send("Performance.getMetrics")["metrics"]}
    # Of the page's own thread: waiting on a busy machine says nothing. We promise 1.5 s.
    assert 0 < metrics["TaskDuration"] < 1.5


def test_a_click_on_a_heading_sorts_by_numbers(page: Page) -> None:
    click = "document.querySelectorAll('#layer-table thead button')[{}].click()"
    headings = page.run(
        "[...document.querySelectorAll('#layer-table thead th')].map(h => h.textContent)"
    )
    scale = headings.index("Scale")
    page.run(click.format(scale))
    assert column(page, "layer-table", 0)[:2] == ["stage.199.conv", "stage.198.conv"]
    page.run(click.format(scale))
    assert column(page, "layer-table", 0)[:3] == ["stage.0.conv", "stage.1.conv", "stage.2.conv"]
    assert (
        page.run(f"document.querySelectorAll('#layer-table th')[{scale}].ariaSort") == "ascending"
    )
    page.run(click.format(0))
    # As people count: 2 stands before 10.
    assert column(page, "layer-table", 0)[9:11] == ["stage.9.conv", "stage.10.conv"]


def test_the_filter_leaves_rows_and_figures_with_every_word(page: Page) -> None:
    page.run(
        "(i => { i.value = 'STAGE.19 conv'; i.dispatchEvent(new Event('input')); })"
        "(document.getElementById('filter'))"
    )
    assert len(column(page, "layer-table", 0)) == 11
    assert len(column(page, "tensor-table", 0)) == 11
    assert page.run("document.querySelectorAll('figure:not([hidden])').length") == 22
    assert page.run("document.getElementById('filter-count').textContent") == "11 of 200 layers"
    # A link to a row that is hidden shows it.
    page.run("location.hash = '#layer-3'")
    page.run("new Promise(done => setTimeout(done, 50))")
    assert len(column(page, "layer-table", 0)) == 200


def test_the_keyboard_reaches_headings_and_sorts(page: Page) -> None:
    page.run("document.querySelectorAll('#tensor-table thead button')[4].focus()")
    page.press("Enter", 13)
    assert column(page, "tensor-table", 0)[0] == "stage.199.conv.input"


def test_plus_and_minus_change_the_size_of_the_plan(page: Page) -> None:
    width = "document.getElementById('plan-svg').width.baseVal.value"
    before = page.run(width)
    page.run("document.querySelector('.plan').focus()")
    page.send("Input.dispatchKeyEvent", type="keyDown", key="+", text="+")
    assert page.run(width) == pytest.approx(1.25 * before)
    page.run("document.querySelector('[data-zoom=\"0\"]').click()")
    assert page.run(width) <= page.run("document.querySelector('.plan').clientWidth")


def test_nothing_is_wider_than_a_phone(page: Page) -> None:
    page.look(390)
    assert page.run("document.documentElement.scrollWidth") == 390
    page.look(1280)


def test_day_and_night_have_colors_of_their_own(page: Page) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    day = page.run(background)
    page.look(1280, dark=True)
    assert day == "rgb(255, 255, 255)" != page.run(background)
    page.look(1280)


def test_every_drawing_has_a_title_and_every_region_a_name(page: Page) -> None:
    unnamed = "[...document.querySelectorAll('{}')].filter(e => !({})).length"
    assert page.run(unnamed.format("svg", "e.querySelector(':scope > title')")) == 0
    assert page.run(unnamed.format("[role=region]", "e.ariaLabel")) == 0
    assert page.run("document.querySelectorAll('svg').length") == 2 * LAYERS + 2


def test_it_can_be_printed(data: ReportData, tmp_path: Path, page: Page) -> None:
    (tmp_path / "small.html").write_text(render(data), encoding="utf-8")
    page.open(tmp_path / "small.html")
    assert page.pdf().startswith(b"%PDF")
    assert page.errors == []


def test_a_text_that_is_a_script_does_not_run(data: ReportData, tmp_path: Path, page: Page) -> None:
    path = tmp_path / "hostile.html"
    html = render(replace(data, name="<script>document.title = 'taken'</script>"))
    # Even where the escaping failed, the browser runs no script but the page's own.
    hole = "<script>document.title = 'taken'</script></body>"
    path.write_text(html.replace("</body>", hole), encoding="utf-8")
    page.open(path)
    assert page.run("document.title").startswith("<script>")
    assert any("Content Security Policy" in error for error in page.errors)
    page.errors.clear()
