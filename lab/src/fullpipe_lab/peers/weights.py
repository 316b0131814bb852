"""Weights in the form that a peer reads."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

from fullpipe.hub import cache
from fullpipe_lab.peers import envs
from fullpipe_lab.peers.known import CONVERTER
from fullpipe_lab.peers.process import RunnerFailed


def as_folder(path: Path, dtype: str) -> Path:
    """A folder as transformers writes it: `path` itself if it is one, else its GGUF weights converted, once.

    A converted file is known by name, size and time of modification. Raises RunnerFailed when it cannot be
    converted, CacheError when the cache cannot be written.
    """
    if path.is_dir():
        return path
    stat = path.stat()
    folder = envs.root() / "weights" / f"{path.stem}-{dtype}-{stat.st_size:x}-{stat.st_mtime_ns:x}"
    if folder.is_dir():
        return folder
    python = envs.interpreter("transformers")
    if python is None:
        raise RunnerFailed("GGUF files are converted for it in the transformers environment, which is not installed")
    cache.make_folder(folder.parent)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _convert(python, path, folder, dtype)
    return folder


def _convert(python: Path, path: Path, folder: Path, dtype: str) -> None:
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    command = [str(python), str(CONVERTER), str(path.absolute()), str(part), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        shutil.rmtree(part, ignore_errors=True)
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        raise RunnerFailed(f"{path.name} cannot be converted: {last.strip()}")
    os.replace(part, folder)
