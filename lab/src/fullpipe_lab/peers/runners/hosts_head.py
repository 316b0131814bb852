"""Fullpipe's head, on a host of a lab: an engine of our own, with every event in reach. Its stages are on the hosts.

    in   {"options": {...}, "hosts": {name: address}, "commands": {name: [...]}}
    out  {"version": ..., "load_s": ..., "settings": {...}}
    in   {"prompt": [token ids], "max_tokens": n, "method": ..., "size": width, or depth, or null}
    out  {"tokens": [...], "times": [...], "told": {...}}

options: as `Options.of` takes them. commands: what runs a command on each host but this one, h1. told: what
`hosts.meter.Meter` tells, and the request's hits, misses and rows.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from typing import Any

from peer_protocol import Reply, Setup, converse  # type: ignore[import-not-found]


def load(setup: Setup) -> tuple[str, Setup, Reply]:
    from fullpipe.cluster.acceptance import Acceptance
    from fullpipe.cluster.contact import CommandContact
    from fullpipe.cluster.hosts import HostEntry
    from fullpipe.cluster.planner import predict
    from fullpipe.methods import WITH_DEPTH
    from fullpipe.options import Options
    from fullpipe.request import SamplingParams
    from fullpipe_lab.asking import Placed
    from fullpipe_lab.hosts.meter import Meter

    entries = [HostEntry(name=name, address=address) for name, address in setup["hosts"].items()]
    contact = CommandContact(entries[0].name, entries, setup["commands"])
    meter = Meter()
    asker = Placed(Options.of(**setup["options"], hosts="ray"), contact=contact, listeners=[meter])  # it says which
    placing, plan = asker.placing, asker.plan

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        size, method = question["size"], question["method"]
        size_of = "depth" if method in WITH_DEPTH else "width"
        asker.use(method, **({} if size is None else {size_of: size}))
        meter.begin()
        (said,) = asker.ask([question["prompt"]], SamplingParams(max_tokens=question["max_tokens"]))
        stats = said.stats
        return {"tokens": said.tokens, "times": meter.times, "told": meter.told() | {
            "hits": stats.hits, "misses": stats.misses, "rows": stats.launched_rows, "wasted": stats.wasted_rows,
            "steps_per_token": stats.steps_per_token, "fill": stats.fill(asker.num_stages),
            "right": list(asker.engine.calibration.right), "promise_ms": promised(method)}}

    def promised(method: str) -> float | None:
        """What the planner's formula makes of this layout, with the draft as it was counted here so far."""
        if method not in ("pp", "fullpipe"):
            return None
        guesser, counted = placing.wanted.guesser, Acceptance.counted(*asker.engine.calibration.right)
        if guesser and counted:
            guesser = replace(guesser, acceptance=counted)
        return 1e3 * predict(placing.survey(plan.hosts), plan.layout, guesser, method=method).seconds

    links = {f"{a}-{b}": {"latency_ms": 1e3 * pair.latency_s, "mbit": pair.bandwidth * 8e-6}
             for (a, b), pair in placing.links().items()}
    return importlib.metadata.version("fullpipe"), {
        "stages": asker.num_stages, "dtype": asker.prepared.target.dtype, "plan": plan.model_dump(mode="json"),
        "links": links}, answer


if __name__ == "__main__":
    converse(load)
