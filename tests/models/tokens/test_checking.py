"""Structures are looked at in another process: that one may die, hang, be interrupted or be forked, and the next answer
is right."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fullpipe.errors import PipelineError
from fullpipe.models.tokens import checking
from fullpipe.models.tokens.checking import Question, Tokens, _Looker

pytest.importorskip("llguidance", reason="the extra 'structured' is not installed")

TOKENS = Tokens(8, (("<|x|>", 5),), (3,))
GOOD, BAD = Question(TOKENS, "regex", "a+"), Question(TOKENS, "regex", "(")
NAMED = Question(TOKENS, "grammar", 'start: <|x|> "a"')


@pytest.fixture
def looker() -> Iterator[_Looker]:
    looker = _Looker()
    yield looker
    looker.close()


def child_of(looker: _Looker) -> psutil.Process:
    assert looker._child is not None
    return psutil.Process(looker._child._process.pid)


def test_what_is_asked_is_answered_and_remembered(looker: _Looker) -> None:
    assert not looker.knows(GOOD)
    assert looker.fault(GOOD) is None and looker.fault(NAMED) is None
    assert "regex" in (looker.fault(BAD) or "")
    assert looker.knows(GOOD) and looker.fault(BAD) == looker.fault(BAD)
    first = child_of(looker).pid
    looker.fault(Question(TOKENS, "regex", "b"))
    assert child_of(looker).pid == first, "one process looks at all"


def test_a_process_that_somebody_killed_is_replaced_and_nothing_is_blamed(looker: _Looker) -> None:
    looker.fault(BAD)
    child_of(looker).kill()
    assert looker.fault(GOOD) is None


def test_one_that_hangs_is_given_up_and_not_remembered(looker: _Looker) -> None:
    looker.fault(BAD)
    looker.patience_s = 0.2
    hanging = child_of(looker)
    hanging.send_signal(signal.SIGSTOP)
    with pytest.raises(PipelineError, match="nobody could look at the structure"):
        looker.fault(GOOD)
    assert not hanging.is_running() and not looker.knows(GOOD)
    looker.patience_s = 20.0
    assert looker.fault(GOOD) is None


def test_an_interrupted_question_has_no_part_in_the_next_one(looker: _Looker, monkeypatch: pytest.MonkeyPatch) -> None:
    looker.fault(NAMED)

    def interrupted(question: Question, patience_s: float) -> bytes:
        raise KeyboardInterrupt

    assert looker._child is not None
    monkeypatch.setattr(looker._child, "ask", interrupted, raising=True)
    with pytest.raises(KeyboardInterrupt):
        looker.fault(BAD)
    assert looker.fault(GOOD) is None and looker.fault(BAD) is not None


def test_one_that_does_not_start_is_no_fault_of_a_structure(looker: _Looker, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'no module' >&2\nexit 1\n")
    script.chmod(0o755)
    for executable, said in ((str(script), "does not start: no module"), (str(tmp_path / "none"), "can be started")):
        looker.python = executable
        with pytest.raises(PipelineError, match=said):
            looker.fault(GOOD)
    assert not looker.knows(GOOD)


def test_what_is_known_is_told_while_something_else_is_looked_at(looker: _Looker) -> None:
    looker.fault(GOOD)
    with looker._turn:
        told = list[str | None]()
        thread = threading.Thread(target=lambda: told.append(looker.fault(GOOD)))
        thread.start()
        thread.join(5)
        assert told == [None]


def test_a_forked_process_asks_one_of_its_own() -> None:
    before = checking._looker
    before.fault(GOOD)
    if (pid := os.fork()) == 0:
        os._exit(0 if checking._looker is not before and checking._looker._child is None else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert before.fault(Question(TOKENS, "regex", "c")) is None
