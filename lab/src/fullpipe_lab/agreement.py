"""Does the virtual clock tell the truth? The same requests on two real stage processes, by the wall clock.

With measured costs the virtual clock adds up what each station's work took here, as if each had this machine to
itself. On a machine with a core for each of two stages that is so, and the two times between tokens must agree.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from fullpipe.llm import LLM
from fullpipe.prompts import FilePrompt
from fullpipe.request import SamplingParams

STAGES = 2
METHODS = ("pp", "fullpipe")


def agreement(model: str, draft: str, prompts: Sequence[FilePrompt], *, tokens: int, repeats: int, dtype: str,
              progress: Callable[[int, int, str], None]) -> list[dict[str, Any]]:
    """A row per method: median time between tokens by the virtual and by the wall clock, and their ratio.

    Both pipelines are loaded at once and asked in turns, so that a noisy moment hits both. One thread each.
    """
    params = SamplingParams(max_tokens=tokens)
    times: dict[tuple[str, str], list[float]] = {}
    texts: dict[str, set[tuple[int, ...]]] = {}
    total, done = len(METHODS) * repeats * len(prompts), 0
    with LLM(model, draft=draft, stages=STAGES, threads=1, dtype=dtype) as virtual, \
         LLM(model, draft=draft, stages=STAGES, threads=1, dtype=dtype, pipeline="distributed") as real:
        for turn in range(-1, repeats):  # the first turn warms caches and is not counted
            for method in METHODS:
                for llm in (virtual, real):
                    llm.use(method)
                for prompt in prompts if turn >= 0 else prompts[:1]:
                    asked = [{"role": "user", "content": prompt.text}]
                    for clock, llm in (("virtual", virtual), ("wall", real)):
                        said = llm.chat(asked, params)
                        texts.setdefault(prompt.id, set()).add(tuple(said.token_ids))
                        if turn >= 0:
                            times.setdefault((method, clock), []).append(said.timing["tbt_s"])
                    if turn >= 0:
                        done += 1
                        progress(done, total, f"{method}, {prompt.id}")
    return [_row(model, draft, method, times, all(len(found) == 1 for found in texts.values())) for method in METHODS]


def _row(model: str, draft: str, method: str, times: dict[tuple[str, str], list[float]], same: bool) -> dict[str, Any]:
    virtual, wall = times[method, "virtual"], times[method, "wall"]
    ratio = statistics.median(a / b for a, b in zip(virtual, wall))
    return {"model": model, "draft": draft, "stages": STAGES, "method": method, "answers": len(wall),
            "TBT ms, virtual time": round(1e3 * statistics.median(virtual), 2),
            "TBT ms, wall clock": round(1e3 * statistics.median(wall), 2),
            "virtual / wall (median of pairs)": round(ratio, 3), "texts identical": same}
