"""Does the virtual clock tell the truth? The same requests on two real stage processes, by the wall clock.

With measured costs the virtual clock adds up what each station's work took here, as if each had this machine to itself.
On a machine with a core for each of two stages that is so, and the two times between tokens must agree.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from fullpipe.options import Options
from fullpipe.prompts import FilePrompt
from fullpipe.request import SamplingParams
from fullpipe_lab.asking import Real, Simulated

STAGES = 2
METHODS = ("pp", "fullpipe")


def agreement(model: str, draft: str, prompts: Sequence[FilePrompt], *, tokens: int, repeats: int, dtype: str,
              progress: Callable[[int, int, str], None]) -> list[dict[str, Any]]:
    """A row per method: median time between tokens by the virtual and by the wall clock, and their ratio.

    Both pipelines of a method are loaded at once and asked in turns, so that a noisy moment hits both. One thread each.
    """
    params, same = SamplingParams(max_tokens=tokens), True
    rows = []
    for done, method in enumerate(METHODS):
        times: dict[str, list[float]] = {"virtual": [], "wall": []}
        options = Options.of(model=model, draft=draft, method=method, stages=STAGES, threads=1, dtype=dtype)
        with Simulated(options, STAGES) as virtual, Real(options) as real:
            for turn in range(-1, repeats):  # the first turn warms caches and is not counted
                for prompt in prompts if turn >= 0 else prompts[:1]:
                    progress(done * repeats + max(turn, 0), len(METHODS) * repeats, f"{method}, {prompt.id}")
                    asked = virtual.encode([{"role": "user", "content": prompt.text}])
                    (here,), (there,) = virtual.ask([asked], params), real.ask([asked], params)
                    same &= here.tokens == there.tokens
                    if turn >= 0:
                        times["virtual"].append(here.stats.tbt_s)
                        times["wall"].append(there.stats.tbt_s)
        rows.append(_row(model, draft, method, times, same))
    return rows


def _row(model: str, draft: str, method: str, times: dict[str, list[float]], same: bool) -> dict[str, Any]:
    ratio = statistics.median(a / b for a, b in zip(times["virtual"], times["wall"]))
    return {"model": model, "draft": draft, "stages": STAGES, "method": method, "answers": len(times["wall"]),
            "TBT ms, virtual time": round(1e3 * statistics.median(times["virtual"]), 2),
            "TBT ms, wall clock": round(1e3 * statistics.median(times["wall"]), 2),
            "virtual / wall (median of pairs)": round(ratio, 3), "texts identical": same}
