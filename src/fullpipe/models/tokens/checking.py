"""A front door asks whether a text can be held to a structure before anybody computes. No torch.

The answer comes from a process of its own (`checker.py`), which a structure may take down.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import OrderedDict

import msgspec

from fullpipe.errors import PipelineError, UsageError
from fullpipe.models.tokens.matching import NO_END, Spelled, library
from fullpipe.request import Structured, StructuredKind

MOST_TEXT = 1 << 18
"""Bytes that a structure may have."""

LIMIT_S = 0.5
"""Processor time that looking at a structure may take; preparing it takes as long at a station."""

_TOLD = 300  # characters of what llguidance says
_KEPT = 256  # structures of which it is remembered what is wrong with them
_PATIENCE_S = 20.0  # on a machine that is busy with other things
_START_S = 60.0
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
    without llguidance; PipelineError where nobody can look at it.

    From any thread. It may take a second, and is quick for one that `is_known`.
    """
    if not tokenizer.eos_ids:
        raise UsageError("this model has no end token, so a structured text would never end", param="structured",
                         hint=NO_END)
    if (size := len(structured.text.encode())) > MOST_TEXT:
        raise UsageError(f"the structure has {size:,} bytes, {MOST_TEXT:,} at most are taken", hint="Make it smaller.",
                         param="structured")
    library()
    if (fault := _looker.fault(_question(structured, tokenizer))) is not None:
        raise UsageError(f"the {_NAMES[structured.kind]} cannot be followed: {_short(fault)}", param="structured",
                         hint=_UNDERSTOOD)


def is_known(structured: Structured, tokenizer: Spelled) -> bool:
    """Whether it was checked before, so that it is quick."""
    return _looker.knows(_question(structured, tokenizer))


def _question(structured: Structured, tokenizer: Spelled) -> Question:
    return Question(_tokens_of(tokenizer), structured.kind, structured.text)


def _tokens_of(tokenizer: Spelled) -> Tokens:
    """Those of the tokenizer that was asked about last are remembered: a process has one, as a rule."""
    for known, tokens in _last:
        if known is tokenizer:
            return tokens
    size = 1 + max([*tokenizer.special.values(), *tokenizer.eos_ids, *getattr(tokenizer, "tokens", ())])
    tokens = Tokens(size, tuple(tokenizer.special.items()), tuple(sorted(tokenizer.eos_ids)))
    _last[:] = [(tokenizer, tokens)]
    return tokens


_last: list[tuple[Spelled, Tokens]] = []


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _TOLD else f"{text[:_TOLD]}..."


# ---- the other process -----------------------------------------------------------------------------------------------


class _Child:
    """Is the process that looks. Raises PipelineError where there can be none."""

    def __init__(self, python: str) -> None:
        try:
            self._process = subprocess.Popen([python, "-P", "-m", "fullpipe.models.tokens.checker"],
                                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except OSError as error:
            raise PipelineError(f"no process can be started to look at structures: {error}", hint=_TRY_AGAIN) from error
        if self._answer(b"", _START_S) is None:
            code, said = self.end()
            last = said.decode(errors="replace").strip().rpartition("\n")[2]
            raise PipelineError(f"the process that looks at structures does not start: {last or f'code {code}'}",
                                hint=_TRY_AGAIN)

    def ask(self, question: Question, patience_s: float) -> bytes | None:
        """A line of JSON; None: it has died. Raises TimeoutError where it was killed for taking longer than that."""
        return self._answer(msgspec.json.encode(question) + b"\n", patience_s)

    def end(self) -> tuple[int, bytes]:
        """Kill it, if it lives; its code, and what it said of errors."""
        self._process.kill()
        _, said = self._process.communicate()
        return self._process.returncode, said

    def how_it_died(self) -> int:
        """Its code; it has died by itself."""
        self._process.communicate()
        return self._process.returncode

    def _answer(self, line: bytes, patience_s: float) -> bytes | None:
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(patience_s, give_up)
        timer.start()
        answer = b""
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(line)
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
        finally:
            timer.cancel()
        if answer.endswith(b"\n"):
            return answer
        if late.is_set():
            raise TimeoutError
        return None


class _Looker:
    """Has structures looked at, one after another, by a process that is started when it is wanted and not there.

    python: that runs it. patience_s: for an answer.
    """

    def __init__(self, python: str = sys.executable, patience_s: float = _PATIENCE_S) -> None:
        self.python, self.patience_s = python, patience_s
        self._lock = threading.Lock()  # of what is known; nobody waits long for it
        self._turn = threading.Lock()  # of the process
        self._child: _Child | None = None
        self._known: OrderedDict[Question, str | None] = OrderedDict()

    def knows(self, question: Question) -> bool:
        with self._lock:
            return question in self._known

    def fault(self, question: Question) -> str | None:
        """What is wrong; None: nothing. Raises PipelineError where it cannot be found out."""
        with self._lock:
            if question in self._known:
                self._known.move_to_end(question)
                return self._known[question]
        with self._turn:
            with self._lock:
                if question in self._known:  # somebody else has asked meanwhile
                    return self._known[question]
            fault = self._ask(question)
            with self._lock:
                self._known[question] = fault
                if len(self._known) > _KEPT:
                    self._known.popitem(last=False)
        return fault

    def _ask(self, question: Question, *, again: bool = False) -> str | None:
        child = self._child = self._child or _Child(self.python)
        try:
            line = child.ask(question, self.patience_s)
        except TimeoutError:
            self._child = None
            child.end()
            raise PipelineError(f"nobody could look at the structure within {self.patience_s:g} s",
                                hint=_TRY_AGAIN) from None
        except BaseException:  # Ctrl-C: its answer would be taken for the next one's
            self._child = None
            child.end()
            raise
        if line is not None:
            return msgspec.json.decode(line, type=str | None)
        self._child, code = None, child.how_it_died()
        if code == -signal.SIGPROF:
            return f"preparing it takes more than {LIMIT_S:g} s"
        if not again:  # it may have died of something else
            return self._ask(question, again=True)
        return "it is nested too deep, or takes too much memory"

    def close(self) -> None:
        """End the process, if there is one."""
        child, self._child = self._child, None
        if child is not None:
            child.end()


_TRY_AGAIN = "Try again; if the machine is short of memory or processes, make room."
_looker = _Looker()


def _begin_anew() -> None:
    """A forked process has no child of its own; that of the other one answers the other one."""
    global _looker
    _looker = _Looker()


atexit.register(lambda: _looker.close())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
