"""The report in a real headless Chromium: it opens from a file, sorts, folds, and complains of nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from synthetic_receipt import METHODS, whole_receipt

from fullpipe.bench.report import write_report

RECEIPT = whole_receipt(stages=(3,), prompts=2, tokens=16)
# The first table with such a column: its texts in that column, from the top.
COLUMN = """
const table = [...document.querySelectorAll("table")].find(table =>
  [...table.tHead.rows[0].cells].some(head => head.textContent === arguments[0]));
const index = [...table.tHead.rows[0].cells].findIndex(head => head.textContent === arguments[0]);
if (arguments[1]) table.tHead.rows[0].cells[index].querySelector("button").click();
return [table.tHead.rows[0].cells[index].getAttribute("aria-sort"),
        [...table.tBodies[0].rows].map(row => row.cells[index].firstChild.textContent)];
"""


@pytest.fixture(scope="module")
def report(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    browser.get(write_report(RECEIPT, tmp_path_factory.mktemp("report"))[0].as_uri())
    return browser


def messages(report: Any) -> list[str]:
    return [entry["message"] for entry in report.get_log("browser")]


def test_a_real_click_on_a_head_sorts_and_a_second_turns_it_round(report: Any) -> None:
    head = next(one for one in report.find_elements("css selector", "th button") if one.text == "hit rate")
    assert report.execute_script(COLUMN, "hit rate", False)[0] is None
    head.click()
    order, down = report.execute_script(COLUMN, "hit rate", False)
    assert order == "descending"
    shares = [float(text.rstrip("%")) for text in down]
    assert shares == sorted(shares, reverse=True)
    assert len(down) == 2 * len(METHODS) and len(set(down)) > 2
    head.click()
    order, up = report.execute_script(COLUMN, "hit rate", False)
    assert order == "ascending" and up == down[::-1]
    assert messages(report) == []


def test_words_are_sorted_as_words(report: Any) -> None:
    _, before = report.execute_script(COLUMN, "texts equal to pp", False)
    order, after = report.execute_script(COLUMN, "program", True)
    assert (order, after) == ("ascending", ["transformers", "vllm"])
    assert report.execute_script(COLUMN, "texts equal to pp", False)[1] == before  # one table at a time
    assert report.execute_script(COLUMN, "program", True) == ["descending", ["vllm", "transformers"]]


def test_cells_without_a_number_come_last_whichever_way(report: Any) -> None:
    for order in ("descending", "ascending"):
        assert report.execute_script(COLUMN, "tbt_ms", True) == [order, ["61.2", "-"]]


def test_samples_unfold(report: Any) -> None:
    folded = report.find_elements("css selector", "details")[-1]
    first = folded.find_element("css selector", "td")
    assert not first.is_displayed()
    folded.find_element("css selector", "summary").click()
    assert first.is_displayed() and first.text == RECEIPT.samples[0].prompt


def test_every_figure_is_drawn_within_the_page(report: Any) -> None:
    boxes = report.execute_script("return [...document.querySelectorAll('figure svg')].map(svg => {"
                                   " const box = svg.getBoundingClientRect();"
                                   " return [box.left, box.right, box.height]; });")
    width = report.execute_script("return document.documentElement.clientWidth;")
    assert len(boxes) == len(list((Path(report.current_url.removeprefix("file://")).parent / "figures").iterdir()))
    assert all(left >= 0 and right <= width and height > 100 for left, right, height in boxes)
    assert report.execute_script("return document.documentElement.scrollWidth;") == width


def test_a_dark_reader_gets_light_letters(report: Any) -> None:
    def ink(theme: str) -> str:
        report.execute_cdp_cmd("Emulation.setEmulatedMedia",
                                {"features": [{"name": "prefers-color-scheme", "value": theme}]})
        return str(report.execute_script("return getComputedStyle(document.querySelector('svg text')).fill;"))

    assert ink("light") == "rgb(27, 31, 36)"
    assert ink("dark") == "rgb(227, 232, 238)"


def test_nothing_was_said_on_the_console(report: Any) -> None:
    report.refresh()
    assert messages(report) == []
    report.execute_script("console.error('a proof that it would be seen')")
    assert len(messages(report)) == 1
