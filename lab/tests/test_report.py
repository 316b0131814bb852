"""The report of a benchmark comes of its receipt alone, and says what was imagined."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_receipt import receipt, sample, whole_receipt

from fullpipe.errors import UsageError
from fullpipe_lab.report import show, write_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(whole_receipt(prompts=2, tokens=24), folder)
    return folder


def test_one_page_and_a_figure_for_each_cluster(folder: Path) -> None:
    assert sorted(path.name for path in folder.rglob("*.*")) == ["report.md", "speedup-0.svg", "speedup-1.svg"]
    text = (folder / "report.md").read_text()
    for figure in ("speedup-0", "speedup-1"):
        assert f"(figures/{figure}.svg)" in text
        assert (folder / "figures" / f"{figure}.svg").read_text().count("<svg") == 1


def test_every_time_names_its_clock_and_every_cluster_its_kind(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "# Fullpipe benchmark, virtual time" in text and "simulated: the tokens" in text
    assert text.count("8 stages, modelled.") == 1 and "by the wall clock: all programs" in text


def test_all_parts_are_there(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    for part in ("## fullpipe beside the best other method", "## gpus-8", "## gpus-14", "## Exactness",
                 "## Other programs", "## Virtual time and the wall clock", "## How it was made", "- seed: 0"):
        assert part in text
    assert "| 0 | pp | 1.00x (1.00-1.00, " in text and "**w 8, qwen2.5-0.5b: " in text
    assert "\n\n\n" not in text and "{{" not in text and "None" not in text


def test_the_same_receipt_makes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for path in write_report(whole_receipt(prompts=2, tokens=24), tmp_path):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()


def test_a_slower_fullpipe_is_called_so(tmp_path: Path) -> None:
    slow = [sample(), sample(method="chain", tbt_s=1.0), sample(method="fullpipe", tbt_s=1.5)]
    write_report(receipt(slow), tmp_path)
    assert "0.67x (SLOWER than chain)" in (tmp_path / "report.md").read_text()


def test_nothing_is_written_of_what_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did not answer the same prompts"):
        write_report(receipt([sample(), sample(method="fullpipe", prompt="other#0")]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cells_are_text_that_a_table_can_hold() -> None:
    assert [show(value) for value in (None, True, False, 0.123456, 3, "a|b\nc")] \
        == ["", "yes", "**no**", "0.1235", "3", "a\\|b c"]
