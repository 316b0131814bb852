"""These functions say where figures come from: command, commit, versions, machine. No torch."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_VERSIONS = ("fullpipe", "torch", "numpy", "gguf", "tokenizers")
_PACKAGE = Path(__file__).parents[1]


def provenance(*folders: Path) -> dict[str, Any]:
    """Command, commit, date, versions and machine. folders: other code of the checkout that decides the figures."""
    commit, _ = commit_of(_PACKAGE)
    dirty = any(commit_of(folder)[1] for folder in (_PACKAGE, *folders))
    return {"command": shlex.join([_program(Path(sys.argv[0])), *sys.argv[1:]]), "commit": commit, "dirty": dirty,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "versions": versions(), "machine": machine()}


def _program(path: Path) -> str:
    """A package that is run by `python -m` is called by its own name."""
    return path.parent.name if path.name == "__main__.py" else path.name


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What this machine calls itself."""
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
