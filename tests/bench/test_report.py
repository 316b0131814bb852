"""The report: whole, self-contained, honest about its clock, and made of the receipt alone."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from synthetic_receipt import METHODS, TASKS, cluster, receipt, sample, whole_receipt
from typer.testing import CliRunner

from fullpipe.bench.document import Cell, Document, Folded, Grid, Heading, Prose, Verbatim, to_html, to_markdown
from fullpipe.bench.figures import Panel, acceptance, cumulative
from fullpipe.bench.receipt import Candidate, Receipt, Tuning, save_receipt
from fullpipe.bench.report import make_report, write_report
from fullpipe.cli.main import app
from fullpipe.errors import MissingExtra, UsageError

VOID = {"meta", "link", "br", "path", "use", "rect", "circle", "line", "image"}
FAST = {"method": "fullpipe", "width": 4, "tbt_s": 0.5, "decode_s": 6.5, "hits": 8, "misses": 1}


class Page(HTMLParser):
    """What a test asks of a page. `open` must be empty in the end: every element was closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "td":
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_report(whole_receipt(stages=(8,), prompts=2, tokens=32), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def html(written: list[Path]) -> str:
    return written[0].read_text(encoding="utf-8")


def test_what_is_said_to_be_written_is_there(written: list[Path]) -> None:
    folder = written[0].parent
    assert [path.name for path in written[:2]] == ["report.html", "report.md"]
    assert {path for path in folder.rglob("*") if path.is_file()} == set(written)
    for figure in written[2:]:
        assert ElementTree.parse(figure).getroot().tag.endswith("svg")


def test_the_page_is_well_formed(html: str) -> None:
    assert Page(html).open == []


def test_the_page_loads_nothing(html: str) -> None:
    page = Page(html)
    links = [value for _, name, value in page.attributes if name.rpartition(":")[2] in ("href", "src", "srcset")]
    assert links and all(value.startswith(("#", "data:")) for value in links)
    assert not [tag for tag, *_ in page.attributes if tag in ("img", "iframe", "object", "embed")]
    assert "@import" not in html
    # What is left of addresses are names of XML dialects, which nobody fetches.
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in html


def test_every_sample_is_in_the_page(html: str) -> None:
    page = Page(html)
    whole = whole_receipt(stages=(8,), prompts=2, tokens=32)
    prompts = [*(one.prompt for one in whole.samples), *(row["prompt"] for row in whole.checks)]
    for prompt in prompts:
        assert page.cells.count(prompt) == prompts.count(prompt)


def test_ids_are_unique_and_every_reference_leads_somewhere(html: str) -> None:
    page = Page(html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = {value[1:] for _, name, value in page.attributes
                  if name.endswith("href") and value.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert references and references <= set(ids)


def test_methods_tasks_and_papers_are_named(html: str) -> None:
    text = Page(html).text
    for word in [*METHODS, *TASKS, "SpecPipe, 8 stages, theirs: 4.19-5.53x", "SpecPipe, 8 stages, theirs: 2.08-2.38x"]:
        assert word in text
    assert "PipeDec" not in text  # its ranges are of 14 stages


def test_imagined_time_is_called_so(html: str, written: list[Path]) -> None:
    for text in (Page(html).text, written[1].read_text(encoding="utf-8")):
        assert "the tokens, trees and acceptances are real, the machines imagined" in text
        assert text.count("virtual time (modelled devices: imagined time, real tokens)") > 5


def test_a_wall_clock_is_called_so() -> None:
    samples = [sample(), sample(**FAST)]
    whole = receipt(samples, clock="wall", clusters=[cluster(label="measured")])
    text = Page(to_html(make_report(whole))).text
    assert "by the wall clock" in text and "wall clock (devices measured)" in text
    assert "virtual" not in text and "imagined" not in text


def test_units_are_no_seconds() -> None:
    whole = receipt([sample(), sample(**FAST)], clusters=[cluster(label="unit")])
    text = Page(to_html(make_report(whole))).text
    assert "TBT units" in text and "tokens/unit" in text and "time per token, units (virtual time)" in text
    assert " ms" not in text


def test_a_dirty_checkout_is_said() -> None:
    text = Page(to_html(make_report(receipt([sample()], dirty=True)))).text
    assert "with uncommitted changes" in text and "dirty: the checkout had uncommitted changes" in text
    assert "dirty" not in Page(to_html(make_report(receipt([sample()])))).text


def test_the_numbers_are_those_of_the_samples() -> None:
    """2 seconds between tokens against a half: four times as fast, five tokens for every two steps."""
    document = make_report(receipt([sample(), sample(**FAST, steps=4.0)]))
    page = Page(to_html(document))
    assert "4.00x0.40 steps" in page.cells
    assert "4.00xfullpipe over pp, two, temperature 0virtual time, modelled, 2 stages" in page.text


def test_a_slower_fullpipe_is_called_slower() -> None:
    rows = [sample(), sample(**FAST | {"tbt_s": 1.0}), sample(method="pipedec", width=4, tbt_s=0.95)]
    assert "0.95xSLOWER than pipedec" in Page(to_html(make_report(receipt(rows)))).cells
    rows[2] = sample(method="pipedec", width=4, tbt_s=0.99)
    assert "0.99xeven with pipedec" in Page(to_html(make_report(receipt(rows)))).cells


def test_what_differs_from_pp_is_counted() -> None:
    rows = [sample(), sample(prompt="set/1#0"), sample(**FAST), sample(**FAST, prompt="set/1#0", same_text=False,
                                                                       near_ties=1)]
    grid = next(block for block in make_report(receipt(rows)).blocks
                if isinstance(block, Grid) and "near-ties" in block.columns)
    assert [cell.text for cell in grid.rows[0]] == ["two", "0", "fullpipe", "1 of 2", "1", "1"]


def exactness(whole: Receipt) -> str:
    text = to_markdown(make_report(whole))
    return text[text.index("## Exactness"):text.index("## How it was made")]


REPLAYED = {"same_text": None, "near_ties": None}


def test_replayed_texts_are_not_called_equal() -> None:
    said = exactness(receipt([sample(**REPLAYED), sample(**FAST, **REPLAYED)]))
    assert "by construction" in said and "was not checked in this run" in said
    assert "texts equal" not in said and " of " not in said.split("nothing to compare")[1]


def test_checks_are_counted_by_combination_and_listed() -> None:
    checks = [{"cluster": "two", "temperature": 0.0, "method": "fullpipe", "prompt": f"set/{index}#0", "tokens": 10,
               "text equal": equal, "steps equal": steps, "near-ties": ties}
              for index, (equal, steps, ties) in enumerate([(True, True, 0), (False, None, 1), (True, False, 2)])]
    whole = receipt([sample(**REPLAYED), sample(**FAST, **REPLAYED)], checks=checks)
    said = exactness(whole)
    assert "by construction" in said and "was not checked" not in said
    assert "| two | 0 | fullpipe | 3 | 2 of 3 | 1 of 2 | 3 |" in said
    assert all(f"| set/{index}" in said for index in range(3))


def test_of_replays_and_runs_the_runs_are_counted() -> None:
    rows = [sample(), sample(prompt="set/1#0"), sample(**FAST), sample(**FAST, **REPLAYED, prompt="set/1#0")]
    assert "| two | 0 | fullpipe | 1 of 1 | 0 | 0 |" in exactness(receipt(rows))


def test_prompts_without_a_tbt_are_named() -> None:
    one = {"prompt": "set/1#0", "tokens": 1, "tbt_s": 0.0}
    whole = receipt([sample(), sample(**FAST), sample(**one), sample(**FAST | one)])
    said = "Left out of every speedup, for an answer of one token has no time between tokens: set/1#0 (temperature 0)."
    assert said in Page(to_html(make_report(whole))).text
    assert "Left out" not in Page(to_html(make_report(receipt([sample(), sample(**FAST)])))).text


def test_a_report_of_answers_that_have_no_tbt() -> None:
    one = {"tokens": 1, "tbt_s": 0.0}
    text = to_markdown(make_report(receipt([sample(**one), sample(**FAST | one)])))
    assert "Left out of every speedup" in text and "inf" not in text and "nan" not in text


def test_engine_time_is_charged_in_full_beside_what_virtual_time_says() -> None:
    samples = [sample(engine_s=0.9), sample(**FAST, engine_s=4.5)]
    page = Page(to_html(make_report(receipt(samples))))
    assert "2.10x4.00x without" in page.cells and "with engine time" in page.text  # (18 + 0.9) / (4.5 + 4.5)
    for changes in ({"clock": "wall"}, {"clusters": [cluster(label="unit")]}):
        assert "with engine time" not in Page(to_html(make_report(receipt(samples, **changes)))).text


def test_one_method_alone_makes_a_report() -> None:
    text = Page(to_html(make_report(receipt([sample(**FAST)])))).text
    assert "fullpipe on the same 1 prompt" in text and "At a glance" not in text


def test_other_programs_and_agreement_are_shown_as_they_came(html: str) -> None:
    cells = Page(html).cells
    assert {"transformers", "61.2", "vllm", "missing", "no environment", "0.934", "yes"} <= set(cells)
    assert Page(html).text.count("From a run of its own") == 2


def test_hostile_words_are_only_words() -> None:
    bad = "</script><script>alert(1)</script>&amp;|`x` $\\frac$"
    whole = receipt(
        [sample(cluster=bad, task=task, prompt=bad + task, draft=bad, finish=bad, method=method)
         for task in (bad, "tame") for method in ("pp", bad)],
        command=bad, notes=[bad], settings={bad: bad}, machine={bad: [1, bad]}, versions={bad: bad},
        peers=[{bad: bad}], agreement=[{bad: {bad: bad}}], checks=[{bad: True, "method": bad, "cluster": [bad]}])
    document = make_report(whole)
    page = Page(to_html(document))
    assert [tag for tag, *_ in page.attributes if tag == "script"] == []  # ours has no attributes
    assert page.open == [] and to_html(document).count("<script") == 1
    assert "alert(1)" in page.text
    assert "<script" not in to_markdown(document).replace(r"\<script", "").replace(bad, "")


def test_a_sweep_in_which_only_drafts_differ() -> None:
    tried = [Candidate(width=None, depth=None, draft=name, floor=None, tbt_s=time)
             for name, time in (("ngram", 0.2), ("model", 0.1))]
    tuning = Tuning(cluster="two", temperature=0.0, method="fullpipe", candidates=tried, best=1, prompts=3)
    text = Page(to_html(make_report(receipt([sample(), sample(**FAST)], tuning=[tuning])))).text
    assert "draft ngram" in text and "no number was varied" in text


# ---- figures ---------------------------------------------------------------------------------------------


def test_a_figure_is_the_same_each_time() -> None:
    panels = [Panel("t", {"pp": [1.0, 2.0]})]
    assert cumulative("a", panels, "pp") == cumulative("a", panels, "pp")


def test_a_figure_takes_the_ink_of_the_page() -> None:
    figure = cumulative("a", [Panel("t", {"pp": [1.0, 2.0]})], "pp")
    assert "currentColor" in figure and "#010203" not in figure and "#000000" not in figure


def test_deep_places_are_pooled() -> None:
    figure = acceptance("a", [Panel("t", {"fullpipe": [(1, 2)] * 9})])
    labels = [element.text for element in ElementTree.fromstring(figure).iter() if element.tag.endswith("text")]
    assert labels[:7] == ["0", "1", "2", "3", "4-5", "6-7", "8-11"]


# ---- the two forms ---------------------------------------------------------------------------------------


def test_markdown_tables_keep_their_columns() -> None:
    grid = Grid("c", ["a|b", "n"], [[Cell("x|y"), Cell("1", "under", 1.0, best=True)]])
    assert to_markdown(Document("t", [grid])).splitlines()[4:] == [
        r"| a\|b | n |", "| --- | ---: |", r"| x\|y | **1** (under) |"]


def test_markdown_folds_and_fences() -> None:
    text = to_markdown(Document("t", [Heading("h", 3), Folded("s & t", [Verbatim("a ```b```")]),
                                      Folded("left out", [Prose("p")], in_markdown=False)]))
    assert "### h" in text and "<summary>s &amp; t</summary>" in text and "````\na ```b```\n````" in text
    assert "left out" not in text


# ---- failures, and the verb ------------------------------------------------------------------------------


def test_without_matplotlib_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match="need matplotlib") as caught:
        write_report(receipt([sample()]), tmp_path / "out")
    assert caught.value.hint == "pip install 'fullpipe[plot]'"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError, match="cannot make the folder"):
        write_report(receipt([sample()]), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


def test_samples_that_cannot_be_compared_leave_the_last_report(tmp_path: Path) -> None:
    write_report(receipt([sample()]), tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(UsageError, match="did not answer the same prompts"):
        write_report(receipt([sample(), sample(**FAST, prompt="other/0#0")]), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_verb_writes_beside_the_receipt(tmp_path: Path) -> None:
    save_receipt(receipt([sample()]), tmp_path / "r.json")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "r-report" / "report.html")
    assert (tmp_path / "r-report" / "report.html").exists()


def test_the_verb_writes_where_it_is_told(tmp_path: Path) -> None:
    save_receipt(receipt([sample()]), tmp_path / "r.json")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "r.json"), "--out", str(tmp_path / "a" / "b")])
    assert result.exit_code == 0 and (tmp_path / "a" / "b" / "report.md").exists()


@pytest.mark.parametrize("content", [None, "{}", '{"format": "fullpipe-bench", "version": 9}'])
def test_the_verb_refuses_a_bad_receipt(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "r.json").write_text(content)
    result = CliRunner().invoke(app, ["report", str(tmp_path / "r.json")])
    assert result.exit_code == 2 and str(tmp_path / "r.json") in result.stderr.replace("\n", "")
    assert not (tmp_path / "r-report").exists()
