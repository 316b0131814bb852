"""What one busy neighbour does to decode steps on all cores, with OpenMP's spinning and without.

SmolLM2-135M in bf16, one-row steps, as many threads as cores, in a fresh process each, while another process
keeps one core busy. Run: python bench/busy_neighbour.py [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

from _receipt import finish, receipt

_STEPS = 12

_CHILD = """
import json, os, sys, time, torch
from fullpipe.hub import resolve

from fullpipe.models.decoder import DecoderSlice, Segment
from fullpipe.models.weights import open_model
files = open_model(resolve("smollm2-135m"))
whole = DecoderSlice(files, 0, files.config.num_layers, has_embedding=True, has_head=True, dtype=torch.bfloat16)
torch.set_num_threads(os.cpu_count())
arena, samples = whole.allocate(64), []
for step in range(int(sys.argv[1])):
    begun = time.perf_counter()
    mask = torch.ones(1, step + 1, dtype=torch.bool)
    at = torch.tensor([step])
    whole.logits(whole.forward(torch.tensor([7]), at, [Segment(0, 1, arena, at, mask)]))
    samples.append(1e3 * (time.perf_counter() - begun))
print(json.dumps(samples[2:]))
"""


def measure(*, busy: bool, spins: str | None) -> list[float]:
    """Milliseconds per step. spins: GOMP_SPINCOUNT, None for OpenMP's default."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("GOMP", "OMP"))}
    if spins is not None:
        environment["GOMP_SPINCOUNT"] = spins
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        out = subprocess.run([sys.executable, "-c", _CHILD, str(_STEPS)], env=environment, check=True,
                             capture_output=True, text=True).stdout
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
    return list(json.loads(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    runs = []
    for _ in range(2):
        for busy in (False, True):
            for spins in (None, "2000"):
                runs.append({"busy": busy, "spins": spins, "ms": measure(busy=busy, spins=spins)})
                print(f"neighbour busy: {busy!s:<5}  GOMP_SPINCOUNT: {spins}  "
                      f"median {statistics.median(runs[-1]['ms']):.1f} ms",
                      flush=True)
    results = {f"{'busy' if busy else 'idle'}, {'default' if spins is None else spins}": round(statistics.median(
        [sample for run in runs if (run["busy"], run["spins"]) == (busy, spins) for sample in run["ms"]]), 1)
        for busy in (False, True) for spins in (None, "2000")}
    finish(receipt("busy_neighbour", results, runs), write=write)


if __name__ == "__main__":
    main()
