"""The comparison: the journal, the pool of processes, what a sample says, and which setting is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_receipt import sample

from fullpipe.cluster.provenance import commit_of
from fullpipe.errors import UsageError
from fullpipe.methods import METHODS
from fullpipe_lab.clusters import Cluster, DraftCosts, unit_cluster
from fullpipe_lab.receipts import Sample
from fullpipe_lab.recording import Answer, Head
from fullpipe_lab.sweep import (
    CHAIN_DEPTHS,
    Journal,
    Plan,
    Setting,
    Unit,
    Worker,
    candidates,
    choose,
    edges,
    matching,
    run_units,
)

HEAD = Head("a model", "float32", 24, 0.0, 7, (), 96)
# Two texts that repeat themselves, so that n-gram has something to find.
ANSWERS = [Answer(f"set/{k}#0", "set", [1, 2, 3, 4 + k, 5, 1, 2, 3], ([4 + k, 5, 1, 2, 3] * 5)[:24], "length")
           for k in range(2)]
PP, NGRAM = Setting("pp", "none"), Setting("fullpipe", "ngram", 4)
SETTINGS = {"3 stages, unit steps": [PP, NGRAM]}


def plan(tmp_path: Path, *clusters: Cluster, workers: int = 1) -> Plan:
    wanted = clusters or (unit_cluster(3),)
    return Plan({one.name: (one.text, one.folder) for one in wanted}, HEAD, None, str(tmp_path / "memo"), workers)


def ran(tmp_path: Path, settings: list[Setting], cluster: Cluster | None = None) -> list[Sample]:
    """In this process."""
    cluster = cluster or unit_cluster(3)
    return Worker(plan(tmp_path, cluster)).run(Unit(ANSWERS[0], tuple((cluster.name, one, "main") for one in settings)))


# ---- samples -----------------------------------------------------------------------------------------------


def test_a_sample_of_pp_is_counted_by_hand(tmp_path: Path) -> None:
    (one,) = ran(tmp_path, [PP])
    assert (one.tokens, one.hits, one.misses, one.launched_rows, one.wasted_rows) == (24, 0, 23, 24, 0)
    assert one.tbt_s == pytest.approx(3e-3) and one.steps_per_token == pytest.approx(3)
    assert one.bubbles == pytest.approx([2 / 3] * 3) and one.draft_busy == 0
    assert one.fill == pytest.approx(1 / 3)
    assert one.link_bytes == [24 * 128 + 31 * 64] * 2  # a flight per token; the first carries the prompt
    assert (one.hits_by_depth, one.asked_by_depth) == ([0], [23])


def test_a_sample_of_fullpipe(tmp_path: Path) -> None:
    pp, one = ran(tmp_path, [PP, NGRAM])
    assert one.hits > 10 and one.tbt_s < pp.tbt_s / 1.5
    assert sum(one.hits_by_depth) == one.hits and sum(one.asked_by_depth) == one.hits + one.misses == 23
    assert one.launched_rows == one.wasted_rows + 24 and one.draft_calls > 0
    assert (one.method, one.draft, one.width, one.depth, one.finish) == ("fullpipe", "ngram", 4, None, "length")


def test_no_draft_model_is_loaded_for_ngram(tmp_path: Path) -> None:
    missing = replace(plan(tmp_path), draft_model=str(tmp_path / "nowhere"))
    (one,) = Worker(missing).run(Unit(ANSWERS[0], (("3 stages, unit steps", NGRAM, "main"),)))
    assert one.hits and not (tmp_path / "memo").exists()


@pytest.mark.parametrize(("sources", "seconds"), [
    (["model"], 2.7519e-3), (["ngram"], 5e-5 + 8 * 4e-5), (["model", "ngram"], 2.7519e-3 + 5e-5 + 8 * 4e-5), ([], 0.0)])
def test_a_draft_call_costs_what_is_asked_in_it(sources: list[str], seconds: float) -> None:
    costs = DraftCosts(Cluster.load("gpus-8"), sources)
    assert costs("draft", 8, 9.0, 0) == pytest.approx(seconds, rel=1e-4)
    assert costs("draft", 0, 9.0, 0) == 0
    assert costs("stage 0", 8, 9.0, 100) == Cluster.load("gpus-8")("stage 0", 8, 9.0, 100)


def test_a_draft_curve_is_meant_for_whoever_drafts() -> None:
    assert DraftCosts(unit_cluster(2), ["ngram"])("draft", 64, 9.0, 0) == 1e-3


# ---- the pool and the journal ------------------------------------------------------------------------------


def test_units_run_in_processes_of_their_own_and_only_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out" / "samples.jsonl")
    told: list[tuple[int, int]] = []
    run_units(plan(tmp_path, workers=2), ANSWERS, SETTINGS, "main", journal, lambda done, total, _: told.append((done,
                                                                                                             total)))
    assert told == [(2, 4), (4, 4)]
    found = {(one.prompt, one.method): one for one in journal.samples}
    assert set(found) == {(answer.id, method) for answer in ANSWERS for method in ("pp", "fullpipe")}
    timeless = {"engine_s": 0.0, "wall_s": 0.0}
    here = ran(tmp_path, [PP, NGRAM])
    assert [one.model_copy(update=timeless) for one in here] \
        == [found[ANSWERS[0].id, one.method].model_copy(update=timeless) for one in here]
    before = journal.path.read_bytes()
    again = Journal(journal.path)
    run_units(plan(tmp_path), ANSWERS, SETTINGS, "main", again, lambda *_: pytest.fail("nothing was left to do"))
    assert journal.path.read_bytes() == before and again.samples == journal.samples


def test_errors_of_a_unit_come_through(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="width must be 1 or more") as caught:
        run_units(plan(tmp_path), ANSWERS[:1], {"3 stages, unit steps": [Setting("fullpipe", "ngram", 0)]}, "main",
                  Journal(tmp_path / "samples.jsonl"), lambda *_: None)
    assert "tree nodes" in (caught.value.hint or "")


def test_a_journal_is_mended_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    journal = Journal(path)
    journal.add([sample(), sample(prompt="set/1#0")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    again = Journal(path)
    assert again.samples == [sample()]
    again.add([sample(prompt="set/1#0")])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("line", ["{}", "text", '{"cluster": "two"}'])
def test_a_damaged_journal_names_the_line_and_stays(tmp_path: Path, line: str) -> None:
    path = tmp_path / "samples.jsonl"
    Journal(path).add([sample()])
    with open(path, "a") as file:
        file.write(line + "\n")
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"samples\.jsonl, line 2: not a") as caught:
        Journal(path)
    assert caught.value.hint and path.read_bytes() == before


def test_a_journal_is_of_one_draft_and_of_clusters_as_they_were(tmp_path: Path) -> None:
    """Names alone do not tell: a file may have been edited, and "model" may have been another one."""
    one, edited = unit_cluster(3), Cluster.parse(unit_cluster(3).text.replace("1.0]]", "2.0]]"), "here", Path())
    assert one.name == edited.name
    journal = Journal(tmp_path / "samples.jsonl")
    journal.bind(plan(tmp_path, one))
    journal.add([sample()])
    first = replace(plan(tmp_path, unit_cluster(4)), draft_model="a draft")
    for fine in (plan(tmp_path, one), first):
        Journal(journal.path).bind(fine)
    for other, says in ((plan(tmp_path, edited), "another cluster 3 stages"),
                        (replace(first, draft_model="b"), "another draft")):
        with pytest.raises(UsageError, match=says) as caught:
            Journal(journal.path).bind(other)
        assert "--out" in (caught.value.hint or "")
    journal.path.unlink()
    Journal(journal.path).bind(plan(tmp_path, edited))  # without samples there is nothing to mix up


# ---- choosing ----------------------------------------------------------------------------------------------


def tried(setting: Setting, tbt_s: float, **changes: object) -> Sample:
    return sample(cluster="two", method=setting.method, draft=setting.draft, width=setting.width, depth=setting.depth,
                  tbt_s=tbt_s, phase="tuning", **changes)


CHAINS = [Setting("chain", "model", None, depth) for depth in (2, 4, 8)]


def test_the_setting_with_the_least_time_between_tokens_is_chosen() -> None:
    """Over all prompts together, and at this temperature alone."""
    samples = [tried(CHAINS[0], 1.0), tried(CHAINS[1], 0.5), tried(CHAINS[2], 0.9),
               tried(CHAINS[0], 1.0, prompt="b", tokens=40), tried(CHAINS[1], 1.4, prompt="b", tokens=40),
               tried(CHAINS[2], 0.9, prompt="b", tokens=40), tried(CHAINS[0], 0.1, temperature=1.0),
               tried(PP, 2.0), tried(PP, 2.0, prompt="b")]
    best, (pp, chain) = choose(samples, ["two"], 0.0, {"two": [PP, *CHAINS]})
    assert best == {"two": [PP, CHAINS[2]]}
    assert (pp.best, chain.best, chain.method, chain.prompts) == (0, 2, "chain", 2)
    assert [one.tbt_s for one in chain.candidates] == pytest.approx([1.0, (0.5 * 9 + 1.4 * 39) / 48, 0.9])
    (note,) = edges([pp, chain])
    assert "chain on two" in note and "(8)" in note


def test_each_cluster_has_its_own_best() -> None:
    samples = [tried(CHAINS[0], 1.0), tried(CHAINS[1], 2.0),
               *(one.model_copy(update={"cluster": "other"}) for one in (tried(CHAINS[0], 3.0), tried(CHAINS[1], 2.0)))]
    best, _ = choose(samples, ["two", "other"], 0.0, {"two": CHAINS[:2], "other": CHAINS[:2]})
    assert best == {"two": [CHAINS[0]], "other": [CHAINS[1]]}


def test_of_a_journal_only_what_was_chosen_counts() -> None:
    """Not the tuning, not another setting, not another prompt."""
    main = [tried(one, 1.0).model_copy(update={"phase": "main"}) for one in CHAINS]
    samples = [*main, tried(CHAINS[1], 1.0), main[1].model_copy(update={"prompt": "b"}),
               main[1].model_copy(update={"temperature": 1.0})]
    assert matching(samples, 0.0, {"two": [CHAINS[1]]}, ["set/0#0"]) == [main[1]]


# ---- where figures come from -------------------------------------------------------------------------------


@pytest.mark.parametrize(("cluster", "label"), [
    (lambda: unit_cluster(3), "unit"), (lambda: Cluster.load("gpus-8"), "modelled"),
    (lambda: edited("1.0]]", "2.0]]"), "modelled"),  # a stage takes twice as long as a draft call
    (lambda: edited("latency_ms = 0.0", "latency_ms = 1.0"), "modelled"),
    (lambda: edited('kind = "modelled"', 'kind = "measured"'), "measured"),
    (lambda: edited("[placement]", '[[links.pair]]\nends = ["unit2", "drafter"]\nlatency_ms = 1.0\n\n[placement]'),
     "modelled"),  # only hidden states go that way
])
def test_a_cluster_is_labelled_by_where_its_times_come_from(cluster: Callable[[], Cluster], label: str) -> None:
    assert cluster().label == label


def edited(old: str, new: str) -> Cluster:
    text = unit_cluster(3).text
    assert old in text
    return Cluster.parse(text.replace(old, new, 1), "here", Path())


def test_a_folder_in_somebody_elses_checkout_has_no_commit(tmp_path: Path) -> None:
    """As when the package is installed below a project that is under version control."""
    assert commit_of(tmp_path) == ("unknown", False)
    nowhere = Path(__file__).parents[2] / ".venv"
    assert not nowhere.is_dir() or commit_of(nowhere) == ("unknown", False)


# ---- what is tried ----------------------------------------------------------------------------------------

BOTH = ("model", "model,ngram")


@pytest.mark.parametrize("method", METHODS)
def test_every_candidate_is_of_its_method_and_no_two_are_alike(method: str) -> None:
    found = candidates(method, BOTH, (4, 8, 32, 64), None)
    assert found and len({one.key for one in found}) == len(found)
    for one in found:
        made = one.make()
        assert made.name == method
        assert one.width is None or made.width == one.width
        assert one.depth is None or made.depth == one.depth  # type: ignore[attr-defined]


def test_what_is_tried_of_each_method() -> None:
    assert candidates("pp", BOTH, (4,), (3,)) == [Setting("pp", "none")]
    assert [(one.draft, one.depth) for one in candidates("chain", BOTH, (4,), (2, 3))] \
        == [("model", 2), ("model", 3), ("model,ngram", 2), ("model,ngram", 3)]
    assert {one.depth for one in candidates("chain", ("ngram",), (4,), None)} == set(CHAIN_DEPTHS)
    assert [(one.width, one.depth) for one in candidates("fullpipe", ("ngram",), (4, 64), (3,))] \
        == [(4, None), (64, None)]


def test_static_trees_of_too_many_rows_are_left_out() -> None:
    found = {(one.width, one.depth) for one in candidates("static-tree", ("ngram",), (8, 32, 64), (3, 16, 40))}
    assert found == {(8, 3), (8, 16), (32, 3)}


def test_an_unknown_method_names_the_known() -> None:
    with pytest.raises(UsageError, match="unknown method 'spp'") as caught:
        candidates("spp", BOTH, (4,), None)
    assert all(name in (caught.value.hint or "") for name in METHODS)


def test_a_setting_in_words() -> None:
    assert str(Setting("static-tree", "model", 8, 4)) == "static-tree, width 8, depth 4, model"
    assert str(Setting("pp", "none")) == "pp"
