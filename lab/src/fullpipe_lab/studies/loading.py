"""What loading takes: memory of a stage against its bytes in the file, and the time until a pair of models is ready.

    python -m fullpipe_lab.studies.loading [--models A,B] [--stages 1,2] [--draft qwen2.5-coder-0.5b] [--repeats 5]
        [--out lab-out/loading] [--quick] [--write]

Memory: a process for each stage. It touches everything that is no weight, notes what it holds, loads its layers as a
worker does, and notes the growth of what it holds (RssAnon and RssShmem) and of the most that it ever held (VmHWM,
reset before). Both are over the bytes that its tensors have in the file; the aims of issue 14 are 1.1 and 1.3. Files
are read with `pread`, so their pages are nobody's.

Time: `fullpipe serve` with the first model in two stages and the draft beside them, from the start of the process until
/ready says so, all files in the page cache. The first start measures what rows cost and keeps it; later ones find it.
The aim is 6 s. What each process then holds is told besides: code, torch and buffers with the weights.

A cell that is done is in --out/journal.jsonl: a run that is killed goes on where it was, with the same code. `--write`
keeps the receipt in lab/receipts/loading.json. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fullpipe.cli.console import print_table
from fullpipe.cli.lists import integers
from fullpipe.cluster.provenance import commit_of
from fullpipe.hub import cache, resolve
from fullpipe.models.dequant import block_shape
from fullpipe.models.dtypes import pick_dtype
from fullpipe.models.files import ModelFiles
from fullpipe.models.slice import load_slice
from fullpipe.models.weights import open_model
from fullpipe.pipeline.launch.local import ALLOCATION
from fullpipe_lab.ending import run
from fullpipe_lab.files import Journal
from fullpipe_lab.receipts import HERE, STUDIES, save_receipt, study_receipt
from fullpipe_lab.studies.serving.processes import workers
from fullpipe_lab.studies.serving.servers import Contender, Setup, running

MODELS = ("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b", "smollm2-135m")
RESIDENT_AIM, PEAK_AIM, READY_AIM_S = 1.1, 1.3, 6.0
_STAGES, _MAX_LEN, _MAX_SEQS = 2, 4096, 16  # of the server
_READ_BYTES = 1 << 24


# ---- memory of a stage -----------------------------------------------------------------------------------------


def file_bytes(files: ModelFiles, first: int, last: int) -> int:
    """What layers first..last (exclusive), with embedding and head where they are at an end, have in the file. A tied
    head is the embedding: a stage with both reads it once."""
    config, outer = files.config, files.config.outer_shapes()
    names = [name for layer in range(first, last) for name in config.layer_shapes(layer)]
    if first == 0:
        names.append("model.embed_tokens.weight")
    if last == config.num_layers:
        names += [name for name in outer if config.tied or name != "model.embed_tokens.weight"]
    return sum(_stored(files, name) for name in dict.fromkeys(names))


def _stored(files: ModelFiles, name: str) -> int:
    numbers, size = block_shape(files.kind(name))
    return math.prod(files.shape(name)) // numbers * size


def cuts(layers: int, stages: int) -> list[tuple[int, int]]:
    """Equal shares of the layers."""
    bounds = [round(index * layers / stages) for index in range(stages + 1)]
    return list(pairwise(bounds))


def memory(status: str) -> dict[str, int]:
    """Bytes by name. status: text of /proc/PID/status."""
    lines = (line.split() for line in status.splitlines() if line.endswith(" kB"))
    return {name.removesuffix(":"): int(size) * 1024 for name, size, _ in lines}


def _memory_of(pid: int | str) -> dict[str, int]:
    return memory(Path(f"/proc/{pid}/status").read_text())


def load_here(path: Path, first: int, last: int) -> dict[str, Any]:
    """Load a stage in this process, now, and say what that took."""
    torch.set_num_threads(1)  # as a worker has
    files = open_model(path)
    dtype, ends = pick_dtype("auto", files=files), {"has_embedding": first == 0,
                                                    "has_head": last == files.config.num_layers}
    _stage(files, first, first + 1, {"has_embedding": False, "has_head": False}, dtype)  # code is no weight
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = _memory_of("self"), time.perf_counter()
    stage = _stage(files, first, last, ends, dtype)
    seconds, after = time.perf_counter() - begun, _memory_of("self")
    assert stage.num_layers == last - first
    return {"dtype": dtype, "seconds": seconds, "file_bytes": file_bytes(files, first, last), "before": _told(before),
            "after": _told(after)}


def _stage(files: ModelFiles, first: int, last: int, ends: Mapping[str, bool], dtype: str) -> Any:
    return load_slice(files, first, last, has_embedding=ends["has_embedding"], has_head=ends["has_head"], dtype=dtype)


def _told(values: Mapping[str, int]) -> dict[str, int]:
    return {name: values[name] for name in ("RssAnon", "RssShmem", "VmRSS", "VmHWM")}


def held(values: Mapping[str, int]) -> int:
    """What is no file's: memory that is mapped for all and memory that is mapped for one process."""
    return values["RssAnon"] + values["RssShmem"]


def load_there(path: Path, first: int, last: int) -> dict[str, Any]:
    """The same in a fresh process, with memory managed as in a worker."""
    command = [sys.executable, "-m", "fullpipe_lab.studies.loading", "--one", str(path), str(first), str(last)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | ALLOCATION)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_row(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios to the bytes in the file. cell: of the journal, with the median of its repeats by each ratio."""
    size = cell["runs"][0]["file_bytes"]
    resident = statistics.median(held(run["after"]) - held(run["before"]) for run in cell["runs"]) / size
    peak = statistics.median(run["after"]["VmHWM"] - run["before"]["VmRSS"] for run in cell["runs"]) / size
    return {"model": cell["model"], "stages": cell["stages"], "layers": cell["layers"],
            "dtype": cell["runs"][0]["dtype"], "file_mb": round(size / 1e6, 1), "resident": round(resident, 3),
            "peak": round(peak, 3), "load_s": round(statistics.median(run["seconds"] for run in cell["runs"]), 3),
            "reached": resident <= RESIDENT_AIM and peak <= PEAK_AIM}


# ---- time until a pair is ready --------------------------------------------------------------------------------


def start_pair(model: Path, draft: Path, home: Path, log: Path) -> dict[str, Any]:
    """Start the server, wait until it is ready, end it. home: its FULLPIPE_HOME."""
    pair = Contender("pair", "Fullpipe", ("--draft", "{draft}", "--stages", str(_STAGES)),
                     {"FULLPIPE_HOME": str(home)})
    setup = Setup(model, f"{draft},ngram", "auto", _MAX_LEN, _MAX_SEQS)
    with running(pair, setup, log) as server:
        processes = {"server": server.process.pid, **{
            name: process.pid for name, process in workers(server.process.pid, _STAGES).items()}}
        return {"ready_s": round(server.load_s, 3),
                "holds": {name: _told(_memory_of(pid)) for name, pid in processes.items()}}


def pair_row(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds until ready: of the first start, which measures what rows cost, and the median of the later ones."""
    first, later = cell["runs"][0]["ready_s"], [run["ready_s"] for run in cell["runs"][1:]]
    ready = statistics.median(later) if later else first
    return {"model": cell["model"], "draft": cell["draft"], "first_s": first, "ready_s": round(ready, 2),
            "reached": ready < READY_AIM_S,
            "held_mb": {name: round(held(values) / 1e6) for name, values in cell["runs"][-1]["holds"].items()}}


def read_once(paths: Iterable[Path]) -> None:
    """Leave the files in the page cache."""
    for path in paths:
        with path.open("rb") as file:
            while file.read(_READ_BYTES):
                pass


# ---- all of it -------------------------------------------------------------------------------------------------


def main() -> None:
    asked = _arguments()
    if asked.one:
        print(json.dumps(load_here(Path(asked.one[0]), int(asked.one[1]), int(asked.one[2]))))
        return
    models, stages = asked.models.split(","), integers(asked.stages, "--stages")
    journal = Journal(asked.out / "journal.jsonl")
    journal.bind({"commit": commit_of(HERE)[0], "repeats": asked.repeats})
    read_once(resolve(name) for name in (*models, asked.draft))
    cells = list(_memory_cells(journal, models, stages, asked.repeats))
    pair = _pair_cell(journal, models[0], asked.draft, asked.repeats, asked.out)
    rows, ready = [memory_row(cell) for cell in cells], pair_row(pair)
    print_table(["model", "stages", "layers", "MB in the file", f"resident (aim {RESIDENT_AIM})",
                 f"peak (aim {PEAK_AIM})", "s", "reached"],
                [[row["model"], str(row["stages"]), row["layers"], f"{row['file_mb']:.0f}", f"{row['resident']:.3f}",
                  f"{row['peak']:.3f}", f"{row['load_s']:.2f}", "yes" if row["reached"] else "NO"] for row in rows])
    print(f"{models[0]} with {asked.draft}: ready after {ready['ready_s']:.2f} s (aim {READY_AIM_S:g}), the first time "
          f"after {ready['first_s']:.2f} s; MB held: {ready['held_mb']}")
    if asked.write:
        save_receipt(study_receipt("loading", {"memory": rows, "pair": ready}, [*cells, pair]),
                     STUDIES / "loading.json")


def _memory_cells(journal: Journal, models: Sequence[str], stages: Sequence[int],
                  repeats: int) -> Iterator[dict[str, Any]]:
    for model in models:
        path = resolve(model)
        for count in stages:
            for first, last in cuts(open_model(path).config.num_layers, count):
                key = f"memory/{model}/{count}/{first}-{last}"
                if key not in journal:
                    runs = [load_there(path, first, last) for _ in range(repeats)]
                    journal.add(key, {"model": model, "stages": count, "layers": f"{first}-{last}", "runs": runs})
                    print(memory_row(journal.rows[key]), file=sys.stderr, flush=True)
                yield journal.rows[key]


def _pair_cell(journal: Journal, model: str, draft: str, repeats: int, out: Path) -> dict[str, Any]:
    key = f"pair/{model}/{draft}"
    if key not in journal:
        with tempfile.TemporaryDirectory() as home:
            os.symlink(cache.home() / "models", Path(home) / "models")
            runs = [start_pair(resolve(model), resolve(draft), Path(home), out / "server.log")
                    for _ in range(1 + repeats)]
        journal.add(key, {"model": model, "draft": draft, "runs": runs})
    return journal.rows[key]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="the first is the one that is served")
    parser.add_argument("--stages", default="1,2", help="into how many each is cut for its memory")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("lab-out/loading"))
    parser.add_argument("--quick", action="store_true", help="SmolLM2 beside itself, once")
    parser.add_argument("--write", action="store_true", help="keep the receipt in lab/receipts")
    parser.add_argument("--one", nargs=3, metavar=("PATH", "FIRST", "LAST"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.quick:
        asked.models, asked.draft, asked.repeats = "smollm2-135m", "smollm2-135m", 1
    return asked


if __name__ == "__main__":
    run(main)
