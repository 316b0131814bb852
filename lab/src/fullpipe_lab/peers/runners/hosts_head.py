"""Fullpipe's head, on a host of a lab: an engine of our own, with every event in reach.

    in   {"options": {...}}     as `Options.of` takes them, the method among them
    out  {"version": ..., "load_s": ..., "settings": {...}}
    in   {"prompt": [token ids], "max_tokens": n, "size": width, or depth, or null}
    out  {"tokens": [...], "times": [...], "told": {...}}

told: what `hosts.meter.Meter` tells, and the request's hits, misses and rows.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from peer_protocol import Reply, Setup, converse  # type: ignore[import-not-found]


def load(setup: Setup) -> tuple[str, Setup, Reply]:
    from fullpipe.assembly import measured, prepare, start
    from fullpipe.methods import WITH_DEPTH
    from fullpipe.options import Options
    from fullpipe.request import SamplingParams
    from fullpipe_lab.asking import Asker
    from fullpipe_lab.hosts.meter import Meter

    options, meter = Options.of(**setup["options"]), Meter()
    prepared = prepare(options)
    pipeline = start(prepared)
    asker = Asker(prepared, pipeline, machine=measured(prepared, pipeline), listeners=[meter])
    method = options.method.method
    size_of = "depth" if method in WITH_DEPTH else "width"

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        size = question["size"]
        asker.use(method, **({} if size is None else {size_of: size}))
        meter.begin()
        (said,) = asker.ask([question["prompt"]], SamplingParams(max_tokens=question["max_tokens"]))
        stats = said.stats
        return {"tokens": said.tokens, "times": meter.times, "told": meter.told() | {
            "hits": stats.hits, "misses": stats.misses, "rows": stats.launched_rows, "wasted": stats.wasted_rows,
            "steps_per_token": stats.steps_per_token, "fill": stats.fill(asker.num_stages)}}

    return importlib.metadata.version("fullpipe"), {
        "stages": asker.num_stages, "dtype": prepared.target.dtype, "promise_ms": None}, answer


if __name__ == "__main__":
    converse(load)
