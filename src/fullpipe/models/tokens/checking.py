"""A front door asks whether a text can be held to a structure before anybody computes. No torch.

The answer comes from a process of its own (`checker.py`), which a structure may take down.
"""

from __future__ import annotations

import atexit
import signal
import subprocess
import sys
import threading
from collections import OrderedDict

import msgspec

from fullpipe.errors import UsageError
from fullpipe.models.tokens.matching import NO_END, Spelled, library
from fullpipe.request import Structured, StructuredKind

MOST_TEXT = 1 << 18
"""Bytes that a structure may have."""

LIMIT_S = 0.5
"""Processor time that looking at a structure may take; preparing it takes as long at a station."""

_TOLD = 300  # characters of what llguidance says
_KEPT = 64  # structures of which it is remembered what is wrong with them
_PATIENCE_S = 20.0  # on a machine that is busy with other things
_NAMES = {"json": "JSON schema", "json_object": "structure", "regex": "regular expression", "choice": "choice",
          "grammar": "grammar"}
_UNDERSTOOD = "What is understood: https://github.com/guidance-ai/llguidance/tree/main/docs"


class Tokens(msgspec.Struct, frozen=True):
    """What a grammar may say of a tokenizer. size: number of tokens; special: numbers of those with names."""

    size: int
    special: tuple[tuple[str, int], ...]
    ends: tuple[int, ...]


class Question(msgspec.Struct, frozen=True):
    tokens: Tokens
    kind: StructuredKind
    text: str


def check_structure(structured: Structured, tokenizer: Spelled) -> None:
    """Raise UsageError for a structure that no text could be held to, or not without taking too long; MissingExtra
    without llguidance.

    From any thread. It may take a second, and is quick for one that was checked before.
    """
    if not tokenizer.eos_ids:
        raise UsageError("this model has no end token, so a structured text would never end", param="structured",
                         hint=NO_END)
    if (size := len(structured.text.encode())) > MOST_TEXT:
        raise UsageError(f"the structure has {size:,} bytes, {MOST_TEXT:,} at most are taken", hint="Make it smaller.",
                         param="structured")
    library()
    if (fault := _looker.fault(Question(_tokens_of(tokenizer), structured.kind, structured.text))) is not None:
        raise UsageError(f"the {_NAMES[structured.kind]} cannot be followed: {_short(fault)}", param="structured",
                         hint=_UNDERSTOOD)


def _tokens_of(tokenizer: Spelled) -> Tokens:
    """Those of the tokenizer that was asked about last are remembered: a process has one, as a rule."""
    if not _last or _last[0][0] is not tokenizer:
        size = 1 + max([*tokenizer.special.values(), *tokenizer.eos_ids, *getattr(tokenizer, "tokens", ())])
        _last[:] = [(tokenizer, Tokens(size, tuple(tokenizer.special.items()), tuple(sorted(tokenizer.eos_ids))))]
    return _last[0][1]


_last: list[tuple[Spelled, Tokens]] = []


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _TOLD else f"{text[:_TOLD]}..."


class _Looker:
    """Has structures looked at, one after another, by a process that is started when it is wanted and not there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: OrderedDict[Question, str | None] = OrderedDict()

    def fault(self, question: Question) -> str | None:
        with self._lock:
            if question not in self._known:
                self._known[question] = self._ask(question)
            self._known.move_to_end(question)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
            return self._known[question]

    def _ask(self, question: Question) -> str | None:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        patience = threading.Timer(_PATIENCE_S, process.kill)
        patience.start()
        try:
            process.stdin.write(msgspec.json.encode(question) + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            patience.cancel()
        return msgspec.json.decode(line, type=str | None) if line.endswith(b"\n") else self._how_it_died(process)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen([sys.executable, "-m", "fullpipe.models.tokens.checker"],
                                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return self._process

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            if self._process is not None:
                self._process.communicate()
                self._process = None

    def _how_it_died(self, process: subprocess.Popen[bytes]) -> str:
        process.communicate()  # closes the pipes
        code, self._process = process.returncode, None
        if code == -signal.SIGPROF:
            return f"preparing it takes more than {LIMIT_S:g} s"
        if code == -signal.SIGKILL:
            return f"preparing it takes more than {_PATIENCE_S:g} s here"
        return "it is nested too deep, or takes too much memory"


_looker = _Looker()
atexit.register(_looker.close)
