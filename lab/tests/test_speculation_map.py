"""The map of rows and levels: its closed form by hand, the profile of a draft, and what is kept and drawn of a run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest

from fullpipe.costs import CostCurve, Machine
from fullpipe_lab.clusters import unit_cluster
from fullpipe_lab.memo import Memo, Memos
from fullpipe_lab.receipts import save_receipt, study_receipt
from fullpipe_lab.recording import Answer, Head, Recording
from fullpipe_lab.studies.speculation_map import (
    PICTURE,
    RECEIPT,
    Kept,
    Profile,
    best_point,
    profile_of,
    run,
    tokens_per_second,
)
from fullpipe_lab.sweep import Setting

PROFILE = Profile(0.8, [(0.0, 0.0), (1.0, 0.1), (2.0, 0.12)], 100)
ANSWER = Answer("code/0#0", "code", [1, 2, 3], [4, 5, 6, 4, 5, 6, 4, 5, 6, 4], "length")
HEAD = Head("tiny", "float32", 10, 0.0, 0, (0,), 10)


def machine(stage: dict[int, float], draft: dict[int, float], *, shared: bool = True, link_s: float = 0.02) -> Machine:
    return Machine(2, stages=[CostCurve(stage)] * 2, draft=CostCurve(draft), link_s=link_s, shared=shared)


# ---- the closed form ---------------------------------------------------------------------------------------


FLAT = {1: 0.010}, {1: 0.005}
RISING = {1: 0.010, 5: 0.018}, {1: 0.005, 3: 0.006}


@pytest.mark.parametrize("curves, shared, rows, levels, right, hit, miss", [
    (FLAT, True, 1, 1, 0.8, 0.015, 0.040 + 0.0001 / 0.030),  # a call and a stage take turns
    (FLAT, False, 1, 1, 0.8, 0.010, 0.040 + 0.005),  # the slower of the two
    (FLAT, False, 4, 4, 0.8, 0.005, 0.040 + 0.015 + 0.0001 / 0.040),  # now the draft is the slower one
    (FLAT, True, 3, 3, 0.8, 0.025 / 3, 0.040 + 0.010 + 0.0001 / 0.050),  # a miss waits for its chain
    (FLAT, True, 2, 1, 0.8375, 0.015, 0.040 + 0.0001 / 0.030),  # a row beside lives 40/15 levels: 0.375 of them a token
    (RISING, True, 3, 1, 0.8 + 0.1 * 2 * 20 / 48, 0.020, 0.048 + 0.000196 / 0.040)])
def test_the_time_of_a_token_is_that_of_a_hit_or_of_a_miss(curves: tuple[dict[int, float], dict[int, float]],
                                                            shared: bool, rows: int, levels: int, right: float,
                                                            hit: float, miss: float) -> None:
    found = tokens_per_second(machine(*curves, shared=shared), PROFILE, rows, levels)
    assert 1 / found == pytest.approx(right * hit + (1 - right) * miss)


def test_where_rows_are_free_as_many_as_catch_anything_are_best_and_where_they_cost_few() -> None:
    free, dear = machine(*FLAT, shared=False), machine({1: 0.010, 101: 0.510}, {1: 0.005}, shared=False)
    assert best_point(free, PROFILE)[1] > 10 > best_point(dear, PROFILE)[1]


@pytest.mark.parametrize("first", [0.5, 0.8, 0.95])
def test_the_best_number_of_levels_is_a_square_root(first: float) -> None:
    """Of q c / ((1 - q) d) where rows are free and nobody guesses beside the chain, as the page says."""
    slow, chain = machine({1: 0.1}, {1: 0.01}), Profile(first, [(0.0, 0.0)], 1)
    best = max(range(1, 40), key=lambda levels: tokens_per_second(slow, chain, levels, levels))
    assert best == pytest.approx(math.sqrt(first * 10 / (1 - first)), abs=2)


# ---- the profile -------------------------------------------------------------------------------------------


SAID = [([1, 2, 3], [math.log(p) for p in (0.6, 0.3, 0.1)], 2),
        ([4, 5, 6], [math.log(p) for p in (0.9, 0.05, 0.04)], 4),
        ([7, 8, 9], [math.log(p) for p in (0.5, 0.2, 0.01)], 9),
        ([1, 2, 3], [math.log(p) for p in (0.5, 0.25, 0.02)], 0)]


def test_a_profile_takes_the_likeliest_of_all_other_guesses_first() -> None:
    found = profile_of(SAID)
    assert (found.first, found.tokens) == (0.25, 4)
    caught = dict(found.caught)
    assert caught[0.0] == 0 and caught[0.3] == 0.25  # 0.3 a token are one of four tokens: the guess of 0.3
    assert caught[1.5] == 0.25 and caught[2.0] == 0.5  # all eight, of which the least likely was right


@pytest.mark.parametrize("others, right", [(0, 0.8), (0.5, 0.85), (1, 0.9), (1.5, 0.91), (2, 0.92), (9, 0.92)])
def test_between_what_was_counted_a_straight_line_and_beyond_it_no_more(others: float, right: float) -> None:
    assert PROFILE.right(others) == pytest.approx(right)


# ---- what is kept ------------------------------------------------------------------------------------------


class Scripted(Memo):
    """A draft that is right with its best guess on the true path, but for every third token."""

    def answers(self, ids: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        logs = [math.log(0.7), math.log(0.2)]
        return [([self._truth[id] if id < len(self._truth) and id % 3 else 9, 8], logs) for id in ids]


class ScriptedMemos:
    def of(self, answer: Answer) -> Memo:
        return Scripted(None, answer.prompt, answer.tokens, HEAD.params, HEAD.vocab)

    def save(self, answer: Answer) -> None:
        pass


def test_what_methods_did_is_kept_and_drawn(tmp_path: Path) -> None:
    recording = Recording.open(tmp_path / "recording.jsonl", HEAD)
    cluster, memos = unit_cluster(2), cast("Memos", ScriptedMemos())
    found = {setting.method: run("two", cluster, setting, [ANSWER], recording, memos)
             for setting in (Setting("pp", "none"), Setting("chain", "model", depth=2),
                             Setting("pipedec", "model", width=2), Setting("fullpipe", "model"))}
    pp = found["pp"]
    assert (pp.tokens, pp.speed, pp.flight) == (10, pytest.approx(500), (1, 1))  # a token a traversal, of 2 ms
    assert found["chain"].flight[0] == found["chain"].flight[1] > 1 == found["pipedec"].flight[1]
    receipt = study_receipt("speculation_map", results(), [asdict(one) for one in found.values()])
    save_receipt(receipt, tmp_path / "map.json")
    kept = Kept(json.loads((tmp_path / "map.json").read_text()))
    assert [line[1] for line in kept.table()] == ["pipedec, width 2", "fullpipe"]
    units = machine({1: 0.001}, {1: 0.001}, shared=False, link_s=0)
    speed = tokens_per_second(units, PROFILE, *found["pipedec"].flight)
    assert kept.table()[0][-2:] == [f"{speed:.1f}", f"{found['pipedec'].speed:.1f}"]
    drawn = kept.picture()
    assert drawn == kept.picture() and "two units" in drawn and "pp: 500.0 tokens a second" in drawn
    assert f"fullpipe: {found['fullpipe'].speed:.0f}" in drawn and "chain, depth 2" in drawn


def test_the_page_says_what_the_receipt_says() -> None:
    page = PICTURE.with_suffix(".md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if re.search(r"\| \d+\.\d\d \| \d+\.\d\d \|", line)]
    kept = Kept(json.loads(RECEIPT.read_text(encoding="utf-8")))
    assert [line.strip("| ").split(" | ")[1:] for line in table] == [line[2:] for line in kept.table()]
    assert f"right for {kept.profile.first:.3f}" in page
    best = [best_point(machine, kept.profile)[1:] for machine in kept.machines.values()]
    assert best == [(3, 2), (64, 3)], "the page says where the tops of the maps are"


def results() -> dict[str, Any]:
    told = {"name": "two", "title": "two units", "stages": [{1: 0.001}, {1: 0.001}], "draft": {1: 0.001}, "link_s": 0.0,
            "shared": False, "draft_link_s": 0.0}
    return {"profile": asdict(PROFILE), "clusters": [told]}
