"""What is said of the cells of a run on hosts. A cell: who was asked, on how many hosts, over which links.

Cells are plain data, as the study's journal and receipt keep them: "hosts", "delay_ms", "method" or "mode", "settings"
and "samples", a row for each prompt (`hosts.asking`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any

from fullpipe_lab.hosts.meter import mean_share
from fullpipe_lab.hosts.places import between
from fullpipe_lab.peers.modes import ALL, better_mode
from fullpipe_lab.peers.records import PeerResult, PeerSample

PLAIN, OURS, THEIRS = "pp", "fullpipe", "llamacpp-rpc"
AIMS = {0.1: 1.0, 10.0: 2.0, 50.0: 4.0, 100.0: 6.0}
"""Of issue 15: llama.cpp's time over ours at least, on two hosts, by one-way delay in ms."""
ALLOWED = 0.2  # a prediction may be off by this share of what is measured
MESH_LLM = {"hosts": 2, "delay_ms": 100.0, "speedup": 2.54}
"""What Mesh-LLM tells of itself on two nodes: with speculation over one draft token at a time."""
Cell = Mapping[str, Any]


def rows_of(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each of our cells; times in milliseconds, means over the prompts.

    speedup: of pp's time between tokens over the method's on the same hosts and links, geometric mean over the prompts,
    and the range. tokens_per_s: from the question to the last token, all prompts together. overlap: share of the time
    between the first and the last token in which two or more stages computed. bytes_per_token: of each link, both ways,
    with packets' headers. promise_ms: predicted, with the
    draft as it was counted until then. identical: to what the first cell said, on every prompt.
    """
    said = texts(cells[0]) if cells else {}
    return [_row(cell, _plain(cells, cell), said) for cell in cells]


def texts(cell: Cell) -> dict[str, list[int]]:
    return {one["prompt"]: one["tokens"] for one in cell["samples"]}


def times(cell: Cell) -> dict[str, float]:
    """Seconds between tokens, by prompt."""
    return {one["prompt"]: found for one in cell["samples"] if (found := between(one["times"])) is not None}


def _plain(cells: Iterable[Cell], beside: Cell) -> dict[str, float]:
    """Those of pp where the other stands."""
    same = (cell for cell in cells if all(cell[name] == beside[name] for name in ("hosts", "delay_ms")))
    return next((times(cell) for cell in same if cell["method"] == PLAIN), {})


def _row(cell: Cell, plain: Mapping[str, float], said: Mapping[str, list[int]]) -> dict[str, Any]:
    mine, samples = times(cell), cell["samples"]
    tbt_ms = 1e3 * fmean(mine.values())
    over = [plain[prompt] / seconds for prompt, seconds in mine.items() if prompt in plain]
    promises = [one["told"].get("promise_ms") for one in samples]
    promise = None if None in promises else round(fmean(promises), 2)
    hits, misses = (sum(one["told"][name] for one in samples) for name in ("hits", "misses"))
    tokens = sum(len(one["tokens"]) for one in samples)
    return {"hosts": cell["hosts"], "delay_ms": cell["delay_ms"], "method": cell["method"], "size": samples[0]["size"],
            "prompts": len(samples), "tbt_ms": round(tbt_ms, 2),
            "speedup": round(geometric_mean(over), 3) if over else None,
            "speedup_range": [round(min(over), 2), round(max(over), 2)] if over else None,
            "tokens_per_s": round(tokens / sum(one["times"][-1] for one in samples), 2),
            "overlap": round(mean_share([(one["told"], one["times"][-1] - one["times"][0]) for one in samples],
                                        "overlap"), 3),
            "hit_rate": round(hits / max(hits + misses, 1), 3),
            "bytes_per_token": {link: round(sum(one["link_bytes"].get(link, 0) for one in samples) / tokens)
                                for link in samples[0]["link_bytes"]},
            "promise_ms": promise, "promise_over": None if promise is None else round(promise / tbt_ms, 3),
            "kept": None if promise is None else abs(promise / tbt_ms - 1) <= ALLOWED,
            "identical": texts(cell) == {prompt: said.get(prompt) for prompt in mine}}


# ---- beside llama.cpp --------------------------------------------------------------------------------------


def beside(cells: Sequence[Cell], rivals: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each delay on two hosts and each set of prompts: our times beside those of llama.cpp's better mode on each
    prompt (`peers.modes.better_mode`), the aim over all prompts, and on how many prompts the texts are the same."""
    rows = []
    for ours in (cell for cell in cells if cell["method"] == OURS and cell["hosts"] == 2):
        theirs = [cell for cell in rivals if cell["delay_ms"] == ours["delay_ms"]]
        found = better_mode([_result(OURS, ours), *(_result(f"{THEIRS}-{cell['mode']}", cell) for cell in theirs)])
        for row in found:
            aim = AIMS.get(ours["delay_ms"]) if row["set"] == ALL else None
            rows.append({"delay_ms": ours["delay_ms"], **row, "aim": aim,
                         "reached": None if aim is None else row["tbt_ahead"] >= aim})
    return rows


def rival_rows(cells: Sequence[Cell], rivals: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each delay and mode of llama.cpp. own_ms: its own count of the time per token; the others' clock is
    that of who asks. same_text: prompts on which it says what we say."""
    said = next((texts(cell) for cell in cells if cell["method"] == OURS), {})
    return [{"delay_ms": cell["delay_ms"], "mode": cell["mode"], "prompts": len(cell["samples"]),
             "tbt_ms": round(1e3 * fmean(times(cell).values()), 2),
             "own_ms": round(fmean(one["told"]["tbt_ms"] for one in cell["samples"]), 2),
             "drafted": sum(one["told"]["drafted"] for one in cell["samples"]),
             "accepted": sum(one["told"]["accepted"] for one in cell["samples"]),
             "bytes_per_token": round(sum(sum(one["link_bytes"].values()) for one in cell["samples"])
                                      / sum(len(one["tokens"]) for one in cell["samples"])),
             "same_text": sum(said.get(prompt) == tokens for prompt, tokens in texts(cell).items())}
            for cell in rivals]


def _result(name: str, cell: Cell) -> PeerResult:
    samples = [PeerSample(one["prompt"], one["task"], 0, one["tokens"], one["times"], "") for one in cell["samples"]]
    return PeerResult(name, name, samples=samples)
