"""The engine's own time per pipeline step: trees, method, bookkeeping. No tensors.

    python -m fullpipe_lab.studies.engine_time [--write]

Scripted stations stand in for the model; the time spent inside the pipeline, stations included, is taken off.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

from fullpipe.engine import Engine
from fullpipe.methods import make_method, options_of
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage
from fullpipe_lab.receipts import STUDIES, save_receipt, study_receipt

TRUTH = {"kind": "hash", "vocab": 1000, "seed": 3}
CELLS = [*((method, 8, 8, 500) for method in ("pp", "static-tree", "pipedec", "fullpipe")),
         *(("fullpipe", 8, 8, tokens) for tokens in (2000, 8000)),
         *(("fullpipe", 8, width, 500) for width in (2, 4, 16, 32, 64)),
         *(("fullpipe", stages, 8, 500) for stages in (2, 16, 32))]
"""Method, stages, width, tokens."""


def measure(method: str, stages: int, width: int, tokens: int, repeats: int = 5) -> dict[str, Any]:
    """Milliseconds of engine time per step, one sample per run, and how large the tree was."""
    samples, live, steps = [], 0, 0.0
    for _ in range(repeats):
        pipeline = InProcessPipeline([ScriptedStage(k, stages, TRUTH) for k in range(stages)],
                                     ScriptedDraft(TRUTH, accuracy=0.7, coverage=0.97, vocab=1000), clock="virtual")
        engine = Engine(pipeline, make_method(method, **options_of(method, width=width)))
        sequence = engine.submit(Request(0, (1, 2, 3), SamplingParams(max_tokens=tokens)))
        stats = engine.stats.of(0)
        gc.collect()
        begun = time.thread_time()
        while engine.busy:
            engine.step()
            live = max(live, sequence.tree.num_live)
        steps = stats.steps
        samples.append(1e3 * (time.thread_time() - begun - pipeline.seconds_inside) / steps)
    return {"method": method, "stages": stages, "width": width, "tokens": tokens, "steps": steps,
            "max_live_nodes": live, "ms_per_step": round(statistics.median(samples), 4), "samples_ms": samples}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the receipt in lab/receipts")
    write, runs = parser.parse_args().write, []
    for method, stages, width, tokens in CELLS:
        runs.append(run := measure(method, stages, width, tokens))
        print(f"{method:<12} stages {stages:>2}  width {width:>2}  tokens {tokens:>4}  live nodes up to "
              f"{run['max_live_nodes']:>5}  {run['ms_per_step']:.3f} ms per step", flush=True)
    if write:
        results = [{key: value for key, value in run.items() if key != "samples_ms"} for run in runs]
        save_receipt(study_receipt("engine_time", {"runs": results}, runs), STUDIES / "engine_time.json")


if __name__ == "__main__":
    main()
