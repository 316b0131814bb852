"""`quick_profile` takes the few times that a plan needs, in some seconds, and keeps them on the host."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fullpipe.cluster.modes import CONTEXT, WIDTHS
from fullpipe.cluster.profile import Profile
from fullpipe.cluster.provenance import versions
from fullpipe.errors import FullpipeError
from fullpipe.hub import cache, resolve

_REPEATS = 5


def quick_profile(model: str, draft: str | None = None, threads: int = 1, *, dtype: str = "auto",
                  quantization: str | None = None, device: str = "cpu", again: bool = False,
                  say: Callable[[str], None] = lambda line: None) -> Profile:
    """What stations take on this machine: the kept profile, or one that is measured now.

    model, draft: names as `fullpipe.hub.resolve` takes them; only the models' headers need be real, for what a step
    takes does not depend on the numbers. draft: None for none to measure. threads: of a station. again: measure even if
    there is a kept one. say: told where it comes from.

    Raises what `cluster.measure.measure` does.
    """
    path = kept_at(model, draft, threads, dtype=dtype, quantization=quantization, device=device)
    kept = None if again else _kept(path)
    if kept is not None:
        say(f"what stations cost here: from {path}; remove it to have it measured again")
        return kept
    say("measuring what stations cost here")
    from fullpipe.cluster.measure import measure

    found = measure(model, draft, rows=WIDTHS, contexts=(CONTEXT,), repeats=_REPEATS, threads=threads, dtype=dtype,
                    quantization=quantization, device=device, quick=True)
    try:
        cache.make_folder(path.parent)
        found.save(path)
        say(f"kept in {path}")
    except FullpipeError:  # a full disk costs the next one some seconds
        pass
    return found


def kept_at(model: str, draft: str | None, threads: int, **how: Any) -> Path:
    """The file of a profile: another one for each version, model file, number of threads, device and machine."""
    what = {"versions": [versions().get(name) for name in ("fullpipe", "torch")],
            "models": [[str(path := resolve(name)), fingerprint(path)] for name in (model, draft) if name],
            "threads": threads, "rows": WIDTHS, "context": CONTEXT, **how,
            "machine": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores"}
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    return cache.home() / "profiles" / f"{name}.quick.json"


def fingerprint(path: Path) -> list[int]:
    """Changes when a model's files do: sizes and moments of the last change."""
    from fullpipe.models.gguf_parts import gguf_parts

    files = sorted(path.iterdir()) if path.is_dir() else gguf_parts(path)
    return [number for file in files for number in (file.stat().st_size, int(file.stat().st_mtime))]


def _kept(path: Path) -> Profile | None:
    """None where there is none, or none that can be read."""
    try:
        return Profile.load(path)
    except FullpipeError:
        return None
