"""Where figures come from: command, commit, versions, machine; and the receipt that holds it all."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from fullpipe.bench.receipt import ClusterInfo, ModelInfo, Receipt, Sample, Tuning
from fullpipe.bench.recording import Recording
from fullpipe.planning.cluster import Cluster

_VERSIONS = ("fullpipe", "torch", "numpy", "gguf", "tokenizers")
_NEAR = 0.05  # of logits: closer than that, another order of summing may pick the other token


def make_receipt(samples: Sequence[Sample], tunings: Sequence[Tuning], clusters: Mapping[str, Cluster],
                 recordings: Mapping[float, Recording], model: str, draft: str, settings: dict[str, Any],
                 *, notes: Sequence[str] = (), **rows: Any) -> Receipt:
    """Of replays, in virtual time. notes: to be said besides. rows: `checks`, and `agreement` and `peers` of other
    runs in the same place."""
    head = next(iter(recordings.values())).head
    infos = [ClusterInfo(name=name, label=label_of(cluster), note=cluster.file.cluster.note.strip(),
                         stages=cluster.num_stages, text=cluster.text) for name, cluster in clusters.items()]
    return Receipt(**provenance(), clock="virtual", model=ModelInfo(target=model, draft=draft, dtype=head.dtype),
                   settings=settings, clusters=infos, samples=list(samples), tuning=list(tunings),
                   notes=[*_notes(recordings), *notes], **rows)


def wall_receipt(model: str, draft: str, dtype: str, settings: dict[str, Any], **rows: Any) -> Receipt:
    """Of what ran on the wall clock: `peers` or `agreement` rows."""
    return Receipt(**provenance(), clock="wall", model=ModelInfo(target=model, draft=draft, dtype=dtype),
                   settings=settings, clusters=[], samples=[], **rows)


def provenance() -> dict[str, Any]:
    """Command, commit, date, versions and machine."""
    commit, dirty = commit_of(Path(__file__).parents[1])
    return {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit, "dirty": dirty,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "versions": versions(), "machine": machine()}


def label_of(cluster: Cluster) -> Any:
    """"unit" where every step takes the same, whatever its rows, and links take nothing."""
    if cluster.file.cluster.kind == "measured":
        return "measured"
    links = cluster.links
    curves = [curve for device in cluster.file.devices for curve in (device.stage_ms, device.draft_ms) if curve]
    instant = all(link.instant for link in (*links.stage_hops, links.to_first, links.landing, links.draft,
                                             *links.taps))
    costs = {point[1] for curve in curves for point in curve}
    curved = all(device.kind == "curve" for device in cluster.file.devices)
    return "unit" if curved and instant and len(costs) == 1 else "modelled"


def _notes(recordings: Mapping[float, Recording]) -> list[str]:
    close = sum(margin is not None and margin < _NEAR for recording in recordings.values()
                for answer in recording.answers.values() for margin in answer.margins)
    tokens = sum(len(answer.tokens) for recording in recordings.values() for answer in recording.answers.values())
    return [f"Every text is the recorded one: a replay fails where it is not. Of the {tokens} recorded picks {close} "
            f"stand less than {_NEAR} above the second best; another machine may decide those otherwise."]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {"cpu": next(names, platform.processor()), "cores": os.cpu_count(), "system": platform.platform()}


def commit_of(folder: Path) -> tuple[str, bool]:
    """The checkout's commit ("unknown" for an installed package), and whether its sources differ from it."""
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD") if git("ls-files", "--", ".") else ""  # of a checkout that holds us
        return (commit, bool(git("status", "--porcelain", "--", "."))) if commit else ("unknown", False)
    except OSError:
        return "unknown", False
