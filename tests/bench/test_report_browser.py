"""The report in a real headless Chromium: it opens from a file, sorts, folds, and complains of nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_receipt import METHODS, whole_receipt

from fullpipe.bench.report import write_report

selenium = pytest.importorskip("selenium", reason="the package selenium is not installed")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed")

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--window-size=1200,1000")
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
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get(write_report(RECEIPT, tmp_path_factory.mktemp("report"))[0].as_uri())
    yield driver
    driver.quit()


def messages(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def test_a_real_click_on_a_head_sorts_and_a_second_turns_it_round(browser: Any) -> None:
    head = next(one for one in browser.find_elements("css selector", "th button") if one.text == "hit rate")
    assert browser.execute_script(COLUMN, "hit rate", False)[0] is None
    head.click()
    order, down = browser.execute_script(COLUMN, "hit rate", False)
    assert order == "descending"
    shares = [float(text.rstrip("%")) for text in down]
    assert shares == sorted(shares, reverse=True)
    assert len(down) == 2 * len(METHODS) and len(set(down)) > 2
    head.click()
    order, up = browser.execute_script(COLUMN, "hit rate", False)
    assert order == "ascending" and up == down[::-1]
    assert messages(browser) == []


def test_words_are_sorted_as_words(browser: Any) -> None:
    _, before = browser.execute_script(COLUMN, "texts equal to pp", False)
    order, after = browser.execute_script(COLUMN, "program", True)
    assert (order, after) == ("ascending", ["transformers", "vllm"])
    assert browser.execute_script(COLUMN, "texts equal to pp", False)[1] == before  # one table at a time
    assert browser.execute_script(COLUMN, "program", True) == ["descending", ["vllm", "transformers"]]


def test_cells_without_a_number_come_last_whichever_way(browser: Any) -> None:
    for order in ("descending", "ascending"):
        assert browser.execute_script(COLUMN, "tbt_ms", True) == [order, ["61.2", "-"]]


def test_samples_unfold(browser: Any) -> None:
    folded = browser.find_elements("css selector", "details")[-1]
    first = folded.find_element("css selector", "td")
    assert not first.is_displayed()
    folded.find_element("css selector", "summary").click()
    assert first.is_displayed() and first.text == RECEIPT.samples[0].prompt


def test_every_figure_is_drawn_within_the_page(browser: Any) -> None:
    boxes = browser.execute_script("return [...document.querySelectorAll('figure svg')].map(svg => {"
                                   " const box = svg.getBoundingClientRect();"
                                   " return [box.left, box.right, box.height]; });")
    width = browser.execute_script("return document.documentElement.clientWidth;")
    assert len(boxes) == len(list((Path(browser.current_url.removeprefix("file://")).parent / "figures").iterdir()))
    assert all(left >= 0 and right <= width and height > 100 for left, right, height in boxes)
    assert browser.execute_script("return document.documentElement.scrollWidth;") == width


def test_a_dark_reader_gets_light_letters(browser: Any) -> None:
    def ink(theme: str) -> str:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia",
                                {"features": [{"name": "prefers-color-scheme", "value": theme}]})
        return str(browser.execute_script("return getComputedStyle(document.querySelector('svg text')).fill;"))

    assert ink("light") == "rgb(27, 31, 36)"
    assert ink("dark") == "rgb(227, 232, 238)"


def test_nothing_was_said_on_the_console(browser: Any) -> None:
    browser.refresh()
    assert messages(browser) == []
    browser.execute_script("console.error('a proof that it would be seen')")
    assert len(messages(browser)) == 1
