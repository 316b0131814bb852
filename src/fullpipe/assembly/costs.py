"""What rows cost on these stations, and how often the draft is right: measured, and kept for the next time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import to_builtins

from fullpipe.assembly.prepare import Prepared, Say, Target, silent
from fullpipe.cluster.calibrate import measure_machine
from fullpipe.cluster.kept import KeptCosts, KeptFates
from fullpipe.cluster.provenance import versions
from fullpipe.costs import Machine
from fullpipe.hub import cache
from fullpipe.live_costs import LiveMachine
from fullpipe.models.gguf_parts import gguf_parts
from fullpipe.pipeline.base import Pipeline
from fullpipe.stations.drafts.names import module_folder
from fullpipe.threads import cores

_ROWS = (1, 2, 4, 8, 16, 32)  # of the flights that are measured
_WORTH_KEEPING_S = 0.1  # a stage that is through with those sooner is measured again


def measured(prepared: Prepared, pipeline: Pipeline, say: Say = silent) -> Machine:
    """What a method is to know of these stations, and how it goes on learning. Rows are measured for the one that
    weighs what they cost; a file keeps what took a while."""
    if prepared.options.method.method != "fullpipe":
        return LiveMachine(pipeline.machine())
    return LiveMachine(costs_of(prepared, pipeline, say))


def costs_of(prepared: Prepared, pipeline: Pipeline, say: Say) -> Machine:
    kept = kept_costs(prepared)
    if machine := kept.load():
        say(f"what rows cost: from {kept.path}; remove it to have it measured again")
        return machine
    say("measuring what rows cost")
    machine = measure_machine(pipeline, _ROWS, draft=not prepared.reads_taps)
    if machine.stage and sum(machine.stage.seconds) > _WORTH_KEEPING_S and kept.save(machine):
        say(f"kept in {kept.path}")
    return machine


def kept_costs(prepared: Prepared) -> KeptCosts:
    options, target = prepared.options.pipeline, prepared.target
    kept_in = {} if target.kv_cache_dtype == "auto" else {"kv_cache_dtype": target.kv_cache_dtype}
    return KeptCosts.of(cache.home() / "profiles", {
        "versions": [versions().get(name) for name in ("fullpipe", "torch")],
        "model": _model(target), "draft": ",".join(prepared.drafts),
        "dtype": target.dtype, "stages": options.stages, "device": target.device, **kept_in,
        "threads": options.threads or (cores() if options.stages is None else 1), "link_ms": options.link_ms})


def kept_fates(prepared: Prepared) -> KeptFates | None:
    """Whether guesses come true is a matter of model and draft, not of the machine or the stages."""
    if prepared.draft is None:
        return None
    target = prepared.target
    folders = [folder for name in prepared.drafts if (folder := module_folder(name))]
    return KeptFates.of(cache.home() / "profiles", {
        "version": versions().get("fullpipe"), "model": _model(target),
        "dtype": target.dtype, "draft": to_builtins(prepared.draft),
        "modules": [_fingerprint(folder) for folder in folders]})


def _model(target: Target) -> list[Any]:
    """What tells it from any other: with an adapter it is another model."""
    return [one for path in (target.path, target.lora) if path for one in (str(path), _fingerprint(path))]


def _fingerprint(path: Path) -> list[int]:
    """Changes when a model's files do: sizes and moments of the last change."""
    files = sorted(path.iterdir()) if path.is_dir() else gguf_parts(path)
    return [number for file in files for number in (file.stat().st_size, int(file.stat().st_mtime))]


