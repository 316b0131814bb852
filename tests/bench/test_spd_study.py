"""The study of draft modules (bench/spd_study): what is counted, and that a run which was killed goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file

import tiny
from fullpipe.prompts import FilePrompt

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from spd_study.cells import STAGES, Cell, main_cells, study_cells
from spd_study.journal import Journal
from spd_study.measure import NEAR, Modules, Study, Truth, compare
from spd_study.pooled import interval, pooled, saved
from spd_study.report import CHAINS, missing, of, parameters, report_of, table, write_receipt


def answer(prompt: str, steps: float, hits: int, misses: int, cell: Cell | None = None, **more: Any) -> dict[str, Any]:
    return {"cell": (cell or Cell("spd", "spd", 4)).to_dict(), "prompt": prompt, "tokens": hits + misses + 1,
            "steps": steps, "hits": hits, "misses": misses, "draft_rows": 20, "near_tie": None} | more


ALL_HIT = answer("a", 4 + 9, 9, 0)  # the first token's way through 4 stages, then one a step
ALL_MISSED = answer("a", 4 * 10, 0, 9)


# ---- cells -----------------------------------------------------------------------------------------------


def test_every_cell_stands_once_and_has_a_name_of_its_own() -> None:
    cells = [*study_cells(), *main_cells()]
    assert len(set(cells)) == len(cells) == len({cell.key for cell in cells})


def test_the_claims_come_first_and_for_every_number_of_stages() -> None:
    first = study_cells()[: 3 * len(STAGES)]
    assert {cell.stages for cell in first} == set(STAGES)
    assert {cell.draft for cell in first} == {"spd", "exit", "ablation"}
    assert all(cell.temperature == 0 and cell.width == 1 and not cell.refresh for cell in first)


@pytest.mark.parametrize("name", CHAINS)
def test_what_the_report_compares_is_measured(name: str) -> None:
    assert {CHAINS[name](n) for n in STAGES} <= {*study_cells(), *main_cells()}


def test_modules_by_name_and_whether_they_are_there(tmp_path: Path) -> None:
    modules = Modules(tmp_path, tmp_path / "shipped")
    assert modules.draft("spd", 8) == f"spd:{tmp_path / 'spd8'}"
    assert modules.draft("main,ngram", 4) == f"spd:{tmp_path / 'shipped'},ngram"
    assert modules.draft("long-exit", 8) == f"exit:{tmp_path / 'long_exit8'}"
    assert modules.has(Cell("ngram", "spd", 4))
    assert not modules.has(Cell("exit", "ppsd", 2))
    (tmp_path / "exit2").mkdir()
    (tmp_path / "exit2" / "model.safetensors").touch()
    assert modules.has(Cell("exit", "ppsd", 2))


# ---- the journal -----------------------------------------------------------------------------------------


def test_a_line_that_a_kill_has_torn_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).add("a", {"steps": 1})
    with path.open("a") as file:
        file.write('{"key": "b", "ste')
    again = Journal(path)
    assert "a" in again and "b" not in again
    again.add("b", {"steps": 2})
    again.add("c", {"steps": 3})
    assert {key: row["steps"] for key, row in Journal(path).rows.items()} == {"a": 1, "b": 2, "c": 3}


# ---- measuring -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that never ends by itself; a token is a letter."""
    folder = tiny.save(tiny.tiny_model("llama", eos_token_id=None), tmp_path_factory.mktemp("target"))
    letters = ["<end>", "Ġ", *map(chr, range(33, 127))]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={one: id for id, one in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def test_what_is_in_the_journal_is_not_measured_again(target: Path, tmp_path: Path) -> None:
    prompts = [FilePrompt("a", "set", ("abcabcabc",)), FilePrompt("b", "set", ("xyxyxy",))]
    cells = [Cell("ngram", "spd", 3), Cell("ngram", "spd", 3, temperature=1.0), Cell("ngram", "spd", 3, free=True),
             Cell("exit", "ppsd", 3)]  # that module has not been trained
    path, modules = tmp_path / "journal.jsonl", Modules(tmp_path, tmp_path)
    Study(str(target), modules, prompts, 9, Journal(path)).run(cells)
    measured = [row for row in Journal(path).rows.values() if "cell" in row]
    assert [(row["cell"]["free"], row["cell"]["temperature"], row["prompt"]) for row in measured] == [
        (False, 0.0, "a"), (False, 0.0, "b"), (False, 1.0, "a"), (False, 1.0, "b"), (True, 0.0, "a"), (True, 0.0, "b")]
    for row in measured:
        assert row["tokens"] == 9 and row["hits"] + row["misses"] == 8 and row["steps"] >= 9
    text = path.read_text()
    Study("no model is there", modules, prompts, 9, Journal(path)).run(cells)
    assert path.read_text() == text


# ---- figures ---------------------------------------------------------------------------------------------


def test_all_hit_and_all_missed() -> None:
    best, worst = pooled([ALL_HIT]), pooled([ALL_MISSED])
    assert (best.hit_rate, best.penalty) == (1.0, 0.0)
    assert best.length == pytest.approx(4 * 10 / 13)
    assert (worst.hit_rate, worst.length) == (0.0, 1.0)
    assert worst.penalty == 9 * 3  # each miss costs the stages that hold nothing right


def test_pooled_counts_tokens_not_answers() -> None:
    both = pooled([ALL_HIT, answer("b", 8, 0, 1)])
    assert both.hit_rate == pytest.approx(9 / 10)
    assert both.steps_per_token == pytest.approx(21 / 12)
    assert both.draft_rows == pytest.approx(40 / 12)


def test_other_numbers_of_stages_do_not_mix() -> None:
    with pytest.raises(ValueError, match="unpack"):
        pooled([ALL_HIT, answer("a", 9, 1, 0, Cell("spd", "spd", 8))])


def test_saved_is_the_share_of_the_penalty_on_common_prompts() -> None:
    before = [answer("a", 13 + 20, 4, 5), answer("only here", 1000, 0, 9)]
    after = [answer("a", 13 + 15, 5, 4)]
    assert saved(before, after) == pytest.approx(0.25)
    assert saved([ALL_HIT], [ALL_HIT]) == 0.0


def test_the_interval_is_around_the_figure_and_always_the_same() -> None:
    samples = [answer(str(k), 13 + 3 * k, 9 - k, k) for k in range(6)]
    low, high = interval(samples, lambda one: one.length)
    assert low < pooled(samples).length < high
    assert (low, high) == interval(samples, lambda one: one.length)
    assert interval([ALL_HIT], lambda one: one.hit_rate) == (1.0, 1.0)


# ---- exactness -------------------------------------------------------------------------------------------


def test_another_text_is_let_pass_only_where_two_picks_were_close() -> None:
    truth = Truth([5, 6, 7], [1.0, NEAR / 2, 1.0])
    assert compare(truth, [5, 6, 7]) is None
    assert compare(truth, [5, 9, 9]) == {"place": 1, "margin": NEAR / 2}
    with pytest.raises(AssertionError, match="which led by 1"):
        compare(truth, [5, 6, 9])
    with pytest.raises(AssertionError, match="2 tokens instead of 3"):
        compare(truth, [5, 6])


# ---- receipt and report ----------------------------------------------------------------------------------


def test_a_receipt_holds_each_sample_on_a_line_and_reads_back(tmp_path: Path) -> None:
    value = {"benchmark": "spd", "results": {"runs": []}, "samples": {"answers": [ALL_HIT, ALL_MISSED], "cost": []}}
    write_receipt(value, tmp_path / "receipt.json")
    text = (tmp_path / "receipt.json").read_text()
    assert json.loads(text) == value
    assert sum('"prompt"' in line for line in text.splitlines()) == 2


def test_the_report_has_what_was_measured_and_leaves_out_what_was_not() -> None:
    answers = [answer("a", 13, 9, 0), answer("a", 20, 7, 2, Cell("spd", "spd", 4, refresh=True)),
               answer("a", 40, 0, 9, Cell("exit", "ppsd", 4, free=True), near_tie={"place": 1, "margin": 0.1})]
    plain = {"cluster": "c", "stages": 4, "prompt": "a", "width": 1, "refresh": False, "hits": 1, "misses": 1}
    clusters = [plain | {"draft": "none", "method": "pp", "tbt_s": 3.0},
                plain | {"draft": "main", "method": "spd", "tbt_s": 2.0}]
    pairs, still = [[0.1, 0.11]] * 3, [[0.1, 0.1]] * 3
    sizes = {"bytes": 9000, "rows": 3, "load": [0.5, 1]}
    cost = [{"key": "taps/n2", "stages": 2, "pairs_s": pairs, "control_s": still, **sizes},
            {"key": "taps/n4", "stages": 4, "pairs_s": pairs, "control_s": pairs, **sizes},
            {"key": "taps/n8", "stages": 8, "pairs_s": pairs, **sizes},  # no control: says nothing
            {"key": "module/n2/spd", "stages": 2, "method": "spd", "refresh": False, "tokens": 10, "taps": 40,
             "bytes": 50000, "median_s": {"stage 0": 0.01, "stage 1": 0.02, "draft": 0.005}}]
    text = report_of({"date": "d", "commit": "c" * 40, "results": {"modules": []}, "samples": {
        "answers": answers, "clusters": clusters, "cost": cost}}, "What it says in words.")
    assert "What it says in words." in text
    assert "| 4 | 100.0%, **3.08** (3.08-3.08) | 0.0%, **1.00** (1.00-1.00) |" in text
    assert "| 2 | +10.0% (+10.0% to +10.0%) | +0.0% (+0.0% to +0.0%) | yes | 3,000 | 0.5 |" in text
    assert "| 4 | +10.0% (+10.0% to +10.0%) | +10.0% (+10.0% to +10.0%) | no |" in text
    assert "| 8 | +" not in text
    assert "| 2, spd | 20.0 | 5.0 | 25% | 5,000 | 4.0 |" in text
    assert "**1.50x**" in text
    assert "3 answers, 2 of them token for token" in text and "0.100" in text
    assert "n-gram" not in text


def test_a_cell_that_was_cut_short_is_not_compared_but_named() -> None:
    whole, cut = Cell("spd", "spd", 8), Cell("ngram", "spd", 8)
    answers = [answer("a", 80, 0, 9, whole), answer("b", 80, 0, 9, whole), answer("a", 17, 9, 0, cut)]
    assert len(of(answers, whole)) == 2 and of(answers, cut) == []
    named = missing(answers)
    assert f"`{cut.key}`" in named and f"`{whole.key}`" not in named


def test_a_table_without_rows_is_nothing() -> None:
    assert table(["a"], [], "title") == ""


def test_parameters_are_those_of_floating_point_tensors(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3, 4, dtype=torch.bfloat16), "norm": torch.zeros(4),
               "draft_ids": torch.zeros(99, dtype=torch.int64)}, str(tmp_path / "m.safetensors"))
    assert parameters(tmp_path / "m.safetensors") == 16
