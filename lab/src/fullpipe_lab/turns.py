"""Methods take turns on one running pipeline, prompt by prompt: what is compared ran one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from fullpipe.methods import WITH_DEPTH
from fullpipe.request import SamplingParams
from fullpipe_lab.asking import Asker

AS_IT_COMES = ("pp", "fullpipe")
Prompt = tuple[str, list[int]]


@dataclass(frozen=True)
class Run:
    """One answer. size: width, or depth, that the method was given; None: its own. tbt_s: seconds between tokens."""

    prompt: str
    method: str
    size: int | None
    tokens: tuple[int, ...]
    tbt_s: float
    hits: int
    misses: int


def ask(on: Asker, prompt: Prompt, method: str, size: int | None, tokens: int) -> Run:
    option = "depth" if method in WITH_DEPTH else "width"
    on.use(method, **({} if size is None else {option: size}))
    (said,) = on.ask([prompt[1]], SamplingParams(max_tokens=tokens))
    return Run(prompt[0], method, size, tuple(said.tokens), said.stats.tbt_s, said.stats.hits, said.stats.misses)


def best_size(on: Asker, prompt: Prompt, method: str, sizes: Sequence[int], tokens: int) -> int | None:
    if method in AS_IT_COMES:
        return None
    return min(sizes, key=lambda size: ask(on, prompt, method, size, tokens).tbt_s)


def turns(on: Asker, prompts: Sequence[Prompt], sizes: dict[str, int | None], repeats: int,
          tokens: int) -> list[dict[str, Run]]:
    """All methods on every prompt; who begins changes from prompt to prompt."""
    found, order = [], list(sizes)
    for _, prompt in product(range(repeats), prompts):
        found.append({method: ask(on, prompt, method, sizes[method], tokens) for method in order})
        order = order[1:] + order[:1]
    return found


def row(method: str, found: Sequence[dict[str, Run]]) -> dict[str, Any]:
    """Times in milliseconds; the speedup is the median over prompts of pp's time between tokens over the method's."""
    speedups = [runs["pp"].tbt_s / runs[method].tbt_s for runs in found]
    hits, misses = sum(runs[method].hits for runs in found), sum(runs[method].misses for runs in found)
    return {"method": method, "size": found[0][method].size,
            "tbt_ms": round(1e3 * statistics.median(runs[method].tbt_s for runs in found), 1),
            "speedup": round(statistics.median(speedups), 2),
            "speedup_range": [round(min(speedups), 2), round(max(speedups), 2)],
            "hit_rate": round(hits / max(hits + misses, 1), 3),
            "over_best_other": over_best_other(method, found),
            "identical": all(runs[method].tokens == runs["pp"].tokens for runs in found)}


def over_best_other(method: str, found: Sequence[dict[str, Run]]) -> float:
    """All time between tokens, of the fastest of the other methods over that of this one."""
    spent = {name: sum(runs[name].tbt_s * (len(runs[name].tokens) - 1) for runs in found) for name in found[0]}
    return round(min(seconds for name, seconds in spent.items() if name != method) / spent[method], 2)


def measure(on: Asker, prompts: Sequence[Prompt], methods: Sequence[str], sizes: Mapping[str, Sequence[int]], *,
            repeats: int = 1, tokens: int, done: Callable[[str], None] = print
            ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ask `pp` and these methods all prompts but the last, on which sizes are tried. Returns a row for each method, and
    what was said.

    sizes: of each method that is not run as it comes, the widths (or depths) to try. done: told of each that is found.
    """
    *counted, other = prompts
    ask(on, other, "pp", None, 8)  # warm: first touches of weights and caches
    best: dict[str, int | None] = {"pp": None}
    for method in methods:
        if method not in best:
            best[method] = best_size(on, other, method, sizes.get(method, ()), max(tokens // 2, 1))
            done(f"{method}: {best[method] or 'as it comes'}")
    found = turns(on, counted, best, repeats, tokens)
    return ([row(method, found) for method in best],
            [{method: asdict(run) for method, run in runs.items()} for runs in found])
