"""The runner's end of the conversation. Standard library alone, for it runs under the peer's own interpreter.

One JSON object per line. The first line that comes in is the set-up, every further one a question; each gets one line
out. What libraries print goes to standard error, so that it cannot come between.

    in   {"model": ..., "draft": ..., "threads": ..., "dtype": ..., "eos": [...], "max_len": ...}
    out  {"version": ..., "load_s": ..., "settings": {...}}
    in   {"prompt": [token ids], "max_tokens": n}
    out  {"tokens": [...], "times": [...]}      times: seconds since the question, one per token
    out  {"failed": "TypeError: ..."}           in place of either; the runner then ends

The end of the input ends the runner, and whatever it has started, even in the middle of an answer.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

Setup = dict[str, Any]
Answer = Callable[[list[int], int], Iterable[list[int]]]
"""(prompt, max_tokens) -> the new tokens as they come, those that come together in one list."""
Reply = Callable[[dict[str, Any]], dict[str, Any]]

_LEAVE_S = 1.0  # what is left of a runner so long after the end of the input is killed


def serve(load: Callable[[Setup], tuple[str, Setup, Answer]]) -> None:
    """load: from the set-up to (version, settings, how to answer). Returns when the input has ended."""
    def loaded(setup: Setup) -> tuple[str, Setup, Reply]:
        version, settings, answer = load(setup)
        return version, settings, partial(_timed, answer)

    converse(loaded)


def converse(load: Callable[[Setup], tuple[str, Setup, Reply]]) -> None:
    """The same conversation about other questions. load: its last result makes a line's answer of the line."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()

    def say(value: dict[str, Any]) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    try:
        first = lines.get()
        if first is None:
            return
        begun = time.perf_counter()
        version, settings, answer = load(json.loads(first))
        say({"version": version, "load_s": time.perf_counter() - begun, "settings": settings})
        while (line := lines.get()) is not None:
            say(answer(json.loads(line)))
    except Exception as error:
        say({"failed": f"{type(error).__name__}: {error}"})
        raise


def _timed(answer: Answer, question: dict[str, Any]) -> dict[str, Any]:
    tokens: list[int] = []
    times: list[float] = []
    begun = time.perf_counter()
    for fresh in answer(question["prompt"], question["max_tokens"]):
        now = time.perf_counter() - begun
        tokens += fresh
        times += [now] * len(fresh)
    return {"tokens": tokens, "times": times}


def _read(lines: queue.SimpleQueue[str | None]) -> None:
    for line in sys.stdin:
        lines.put(line)
    lines.put(None)
    time.sleep(_LEAVE_S)
    if os.getpgrp() == os.getpid():  # never the group of a shell that started us by hand
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
