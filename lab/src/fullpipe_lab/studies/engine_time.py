"""The engine's own time per pipeline step: tree, policy, bookkeeping. No tensors.

Scripted stations stand in for the model; the time spent inside the pipeline (stations included) is taken
off. Run: python bench/engine_time.py [--write]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

from _receipt import finish, receipt

from fullpipe.engine.loop import Engine
from fullpipe.messages import Event, Flight
from fullpipe.methods import make_policy
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage

TRUTH = {"kind": "hash", "vocab": 1000, "seed": 3}


class Stopwatch(Pipeline):
    """Passes everything on and counts the time spent inside."""

    def __init__(self, inner: Pipeline) -> None:
        self.inner, self.seconds = inner, 0.0
        self.num_stages, self.has_draft = inner.num_stages, inner.has_draft

    def _inside(self, call: Any, *arguments: Any) -> Any:
        begun = time.perf_counter()
        result = call(*arguments)
        self.seconds += time.perf_counter() - begun
        return result

    def launch(self, flight: Flight) -> None:
        self._inside(self.inner.launch, flight)

    def draft(self, job: Flight) -> None:
        self._inside(self.inner.draft, job)

    def cancel(self, nodes: list[int]) -> None:
        self._inside(self.inner.cancel, nodes)

    def events(self) -> list[Event]:
        return self._inside(self.inner.events)

    def now(self) -> float:
        return self.inner.now()

    def close(self) -> None:
        self.inner.close()


def measure(method: str, *, stages: int, width: int, tokens: int, repeats: int = 5) -> dict[str, Any]:
    """Milliseconds of engine time per step, one sample per run, and how large the tree was."""
    samples, live, steps = [], 0, 0.0
    for _ in range(repeats):
        inner = InProcessPipeline([ScriptedStage(k, stages, TRUTH) for k in range(stages)],
                                  ScriptedDraft(TRUTH, accuracy=0.7, coverage=0.97, vocab=1000))
        pipeline = Stopwatch(inner)
        engine = Engine(pipeline, make_policy(method, width=width))
        track = engine.submit(Request(0, (1, 2, 3), SamplingParams(max_tokens=tokens)))
        gc.collect()
        begun = time.perf_counter()
        while engine.busy:
            engine.step()
            live = max(live, track.tree.num_live)
        spent = time.perf_counter() - begun - pipeline.seconds
        steps = track.stats.steps
        samples.append(1e3 * spent / steps)
    return {"method": method, "stages": stages, "width": width, "tokens": tokens, "steps": steps,
            "max_live_nodes": live, "ms_per_step": round(statistics.median(samples), 4), "samples_ms": samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    runs = [measure(method, stages=8, width=8, tokens=500) for method in ("pp", "static-tree", "pipedec", "fullpipe")]
    runs += [measure("fullpipe", stages=8, width=8, tokens=tokens) for tokens in (2000, 8000)]
    runs += [measure("fullpipe", stages=8, width=width, tokens=500) for width in (2, 4, 16, 32, 64)]
    runs += [measure("fullpipe", stages=stages, width=8, tokens=500) for stages in (2, 16, 32)]
    for run in runs:
        print(f"{run['method']:<12} stages {run['stages']:>2}  width {run['width']:>2}  tokens {run['tokens']:>4}  "
              f"live nodes up to {run['max_live_nodes']:>5}  {run['ms_per_step']:.3f} ms per step")
    results = [{key: value for key, value in run.items() if key != "samples_ms"} for run in runs]
    finish(receipt("engine_time", {"runs": results}, runs), write=write)


if __name__ == "__main__":
    main()
