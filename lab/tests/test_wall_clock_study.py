"""The study on the wall clock: who is given which size, who runs when, and what is said of it."""

from __future__ import annotations

from typing import Any, cast

import pytest

from fullpipe.engine import RequestStats
from fullpipe_lab.asking import Real, Said
from fullpipe_lab.turns import Run, best_size, over_best_other, row, turns

PROMPT = "code", [1, 2, 3]


class Scripted:
    """Stands where `Real` does: an answer of five tokens takes what `seconds` says of method and options."""

    def __init__(self, seconds: dict[tuple[str, int | None], float]) -> None:
        self._seconds, self._now = seconds, ("", cast("int | None", None))
        self.used: list[tuple[str, int | None]] = []

    def use(self, method: str, **options: Any) -> None:
        assert set(options) <= {"depth" if method == "chain" else "width"}
        self._now = method, next(iter(options.values()), None)
        self.used.append(self._now)

    def ask(self, prompts: list[list[int]], params: Any) -> list[Said]:
        stats = RequestStats(0.0, first_token=1.0, last_token=1.0 + 4 * self._seconds[self._now], num_emitted=5)
        return [Said(stats, [1, 2, 3, 4, 5])]


def real(seconds: dict[tuple[str, int | None], float]) -> Any:
    return cast(Real, Scripted(seconds))


def test_the_others_get_their_best_size_and_fullpipe_runs_as_it_comes() -> None:
    on = real({("chain", 2): 0.3, ("chain", 4): 0.2, ("chain", 8): 0.4})
    assert best_size(on, PROMPT, "chain", [2, 4, 8], 5) == 4
    assert on.used == [("chain", 2), ("chain", 4), ("chain", 8)]
    assert best_size(on, PROMPT, "fullpipe", [2, 4, 8], 5) is None and len(on.used) == 3


def test_all_take_turns_and_another_begins_at_each_prompt() -> None:
    on = real({("pp", None): 0.4, ("chain", 4): 0.2, ("fullpipe", None): 0.1})
    found = turns(on, [PROMPT, PROMPT], {"pp": None, "chain": 4, "fullpipe": None}, 2, 5)
    assert [method for method, _ in on.used] == [
        "pp", "chain", "fullpipe", "chain", "fullpipe", "pp", "fullpipe", "pp", "chain", "pp", "chain", "fullpipe"]
    assert len(found) == 4 and found[0]["chain"].tbt_s == pytest.approx(0.2)


def run(method: str, tbt_s: float, tokens: int = 5, *, last: int = 5) -> Run:
    return Run("code", method, None, (*range(1, tokens), last), tbt_s, 3, 1)


def test_a_row_compares_prompt_by_prompt_and_with_the_fastest_other_over_all() -> None:
    found = [{"pp": run("pp", 0.4), "chain": run("chain", 0.2), "fullpipe": run("fullpipe", 0.1)},
             {"pp": run("pp", 0.4), "chain": run("chain", 0.1), "fullpipe": run("fullpipe", 0.2)},
             {"pp": run("pp", 0.4), "chain": run("chain", 0.6), "fullpipe": run("fullpipe", 0.1)}]
    assert row("fullpipe", found) == {
        "method": "fullpipe", "size": None, "tbt_ms": 100.0, "speedup": 4.0, "speedup_range": [2.0, 4.0],
        "hit_rate": 0.75, "over_best_other": 2.25, "identical": True}
    assert over_best_other("chain", found) == 0.44


def test_another_text_is_told() -> None:
    found = [{"pp": run("pp", 0.4), "fullpipe": run("fullpipe", 0.1, last=9)}]
    assert row("pp", found)["identical"] and not row("fullpipe", found)["identical"]
