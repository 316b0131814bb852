"""The command as a user runs it: in this process where only what it says matters, else in one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from typer.testing import CliRunner, Result

from fullpipe.cli.main import app

PIPELINES = (None, 2)  # one process, and stages
METHODS = ("pp", "chain", "static-tree", "pipedec", "spd", "ppsd", "fullpipe")
PROMPT = "hello there, hello there"
CONTEXT = 16384  # tokens that the models below take


@dataclass(frozen=True)
class Models:
    """A target, a draft that is mostly right, and a stranger that spells with other ids."""

    target: Path
    draft: Path
    stranger: Path


def run(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def asking(model: Path | str, *more: str | Path, prompt: str = PROMPT, draft: Path | str = "ngram",
           stages: int | None = None) -> list[str]:
    """Arguments of a small exact run on one thread, in one process or on so many stages."""
    cut = [] if stages is None else ["--stages", str(stages)]
    return ["generate", prompt, "--model", str(model), "--draft", str(draft), *cut,
            "--dtype", "float32", "--threads", "1", *map(str, more)]


@dataclass
class Running:
    """A command in a process of its own."""

    process: subprocess.Popen[bytes]

    @property
    def workers(self) -> list[psutil.Process]:
        """Its stage and draft processes, in the order in which they were started."""
        return sorted(psutil.Process(self.process.pid).children(recursive=True),
                      key=lambda child: (child.create_time(), child.pid))

    def first_bytes(self) -> bytes:
        """Wait for the beginning of its output; it has not ended then."""
        assert self.process.stdout is not None
        first = os.read(self.process.stdout.fileno(), 1 << 16)
        assert first and self.process.poll() is None, f"it ended with {first!r}"
        return first

    def until_it_speaks(self, trace: Path) -> None:
        """With `--json` nothing is printed before the end; its `--events` tell."""
        while not (trace.exists() and b'"Emitted"' in trace.read_bytes()):
            assert self.process.poll() is None, "it has ended"
            time.sleep(0.02)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str, str]:
        """Wait for its end: exit code, the rest of its output, its standard error."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out.decode(), err.decode()


@contextmanager
def running(arguments: list[str], folder: Path) -> Iterator[Running]:
    """Start it with `folder`, which must be empty again at the end, for temporary files. No process may be left."""
    process = subprocess.Popen([sys.executable, "-m", "fullpipe", *arguments], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "TMPDIR": str(folder)})
    one, seen = Running(process), []
    try:
        yield one
        seen = [child for child in psutil.process_iter(["environ"])
                if (child.info["environ"] or {}).get("TMPDIR") == str(folder)]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
    assert not seen, f"left behind: {seen}"
    assert not list(folder.iterdir())
