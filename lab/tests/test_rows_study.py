"""The studies of steps beside llama.cpp and of loading: who has a turn when, and what is made of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from fullpipe_lab.studies.loading import cuts, memory, memory_row, pair_row
from fullpipe_lab.studies.rows_beside_llamacpp import AIMS, CONTEXT, ROWS, measure, row_of, table, turns


class Pretended:
    """Takes as many milliseconds as it is told to, and a thousand where the step does not count."""

    def __init__(self, name: str, ms: float, asked: list[tuple[str, int, int, int]], top: int = 7) -> None:
        self.name, self.ms, self.asked, self.top = name, ms, asked, top

    def step(self, tokens: Sequence[int], start: int, outputs: int) -> tuple[float, int]:
        self.asked.append((self.name, len(tokens), start, outputs))
        return (self.ms if sum(one[0] == self.name for one in self.asked) % 2 == 0 else 1000.0), self.top


def test_all_take_turns_and_the_first_step_of_a_turn_does_not_count() -> None:
    asked: list[tuple[str, int, int, int]] = []
    on = {"fullpipe": Pretended("fullpipe", 2.0, asked), "llamacpp": Pretended("llamacpp", 4.0, asked)}
    found = turns(on, [1, 2, 3], 128, 3, 2)
    assert found == {"samples_ms": {"fullpipe": [2.0, 2.0], "llamacpp": [4.0, 4.0]}, "same_top": True}
    names = [name for name, *_ in asked]
    assert names == ["fullpipe"] * 2 + ["llamacpp"] * 4 + ["fullpipe"] * 2
    assert set(asked) == {(name, 3, 128, 3) for name in on}


def test_a_step_stands_behind_the_context_and_a_prompt_behind_nothing() -> None:
    asked: list[tuple[str, int, int, int]] = []
    on, text = {"fullpipe": Pretended("fullpipe", 1.0, asked)}, list(range(512))
    measure("steps", on, text, 4, 1)
    assert asked == [("fullpipe", CONTEXT, 0, 1), ("fullpipe", 4, CONTEXT, 4), ("fullpipe", 4, CONTEXT, 4)]
    asked.clear()
    measure("prefill", on, text, 512, 1)
    assert asked == [("fullpipe", 512, 0, 1)] * 2


def test_another_likeliest_token_is_told() -> None:
    on = {"fullpipe": Pretended("fullpipe", 1.0, []), "llamacpp": Pretended("llamacpp", 1.0, [], top=8)}
    assert turns(on, [1], 128, 1, 1)["same_top"] is False


def cell(part: str = "steps", model: str = "smollm2-135m", rows: int = 8, **ms: float) -> dict[str, Any]:
    return {"part": part, "model": model, "rows": rows, "same_top": True,
            "samples_ms": {name.replace("_", "-"): [value, value, 9 * value] for name, value in ms.items()}}


def test_ratios_of_medians_stand_beside_the_aims() -> None:
    row = row_of(cell(fullpipe=5.0, llamacpp_native=25.0, llamacpp=10.0))
    assert row["ms"] == {"fullpipe": 5.0, "llamacpp-native": 25.0, "llamacpp": 10.0}
    assert (row["over"], row["aim"]) == ({"llamacpp-native": 0.2, "llamacpp": 0.5}, 0.25)
    assert row["reached"] == {"llamacpp-native": True, "llamacpp": False}
    assert row_of(cell(rows=3, fullpipe=5.0, llamacpp=10.0))["reached"] is None
    assert row_of(cell(part="prefill", rows=512, fullpipe=5.0, llamacpp=4.0))["reached"] == {"llamacpp": False}


def test_the_table_names_what_falls_short() -> None:
    heads, lines = table([row_of(cell(fullpipe=5.0, llamacpp=10.0)),
                          row_of(cell(part="prefill", rows=512, fullpipe=1000.0, llamacpp=2000.0))])
    assert heads == ["model", "rows", "fullpipe", "llamacpp", "time / llamacpp", "aim", "same top"]
    assert lines[0] == ["smollm2-135m", "8", "5.0 ms", "10.0 ms", "0.50 (short)", "0.25", "yes"]
    assert lines[1][1:5] == ["prompt of 512", "512.0 tokens/s", "256.0 tokens/s", "0.50"]


def test_every_aim_of_the_issue_is_there() -> None:
    assert all(tuple(aims) == ROWS for aims in AIMS.values()) and AIMS["qwen2.5-coder-1.5b"][8] == 0.2


# ---- loading -----------------------------------------------------------------------------------------------


def test_layers_are_cut_evenly() -> None:
    assert cuts(5, 2) == [(0, 2), (2, 5)] and cuts(3, 1) == [(0, 3)]


def test_memory_is_read_in_bytes() -> None:
    assert memory("Name:\tx\nVmHWM:\t     20 kB\nRssAnon:\t 4 kB\nThreads:\t3\n") == {"VmHWM": 20480, "RssAnon": 4096}


def held(anon: int, shmem: int, rss: int, peak: int) -> dict[str, int]:
    return {"RssAnon": anon, "RssShmem": shmem, "VmRSS": rss, "VmHWM": peak}


@pytest.mark.parametrize("peak, reached", [(1290, True), (1500, False)])
def test_memory_is_told_over_the_bytes_in_the_file(peak: int, reached: bool) -> None:
    run = {"file_bytes": 1000, "dtype": "stored", "seconds": 0.5, "before": held(10, 0, 200, 200),
           "after": held(60, 1000, 1300, 200 + peak)}
    row = memory_row({"model": "m", "stages": 1, "layers": "0-3", "runs": [run, run]})
    assert (row["resident"], row["peak"], row["reached"]) == (1.05, peak / 1000, reached)


def test_the_first_start_is_told_apart() -> None:
    runs = [{"ready_s": seconds, "holds": {"stage 0": held(2_000_000, 3_000_000, 0, 0)}} for seconds in (9.0, 4.0, 5.0)]
    row = pair_row({"model": "m", "draft": "d", "runs": runs})
    assert (row["first_s"], row["ready_s"], row["reached"], row["held_mb"]) == (9.0, 4.5, True, {"stage 0": 5})
    assert pair_row({"model": "m", "draft": "d", "runs": runs[:1]})["ready_s"] == 9.0
