"""An agent answers whatever comes, and what it answers becomes words with its host, or an error with a way out."""

from __future__ import annotations

from concurrent.futures import Future

import msgspec
import pytest

from fullpipe import errors
from fullpipe.cluster.agent import SAME_EVERYWHERE, Agent, Answer, Failed, Listen, Ping, told
from fullpipe.cluster.contact import Contact
from fullpipe.cluster.hosts import HostEntry
from fullpipe.errors import PipelineError, UsageError, by_name
from fullpipe.pipeline.keys import RunKeys
from fullpipe.pipeline.launch.base import Launcher


def encoded(thing: object) -> bytes:
    return msgspec.msgpack.encode(thing)


@pytest.mark.parametrize("request_", [b"", b"\xff", b"\x93", encoded({"type": "Reboot"}),
                                      encoded({"type": "Listen"})])
def test_words_that_it_does_not_know_are_another_version(request_: bytes) -> None:
    with pytest.raises(PipelineError) as caught:
        told(Agent().do(request_), "beta")
    assert caught.value.message.startswith("beta does not understand this host: ")
    assert caught.value.hint == SAME_EVERYWHERE


def test_what_went_wrong_there_is_the_same_error_here_with_its_host() -> None:
    with pytest.raises(UsageError) as caught:
        told(Agent().do(encoded(Listen("203.0.113.7", 0, RunKeys.new()))), "beta")
    assert caught.value.message == "beta: 203.0.113.7 is no address of this machine" and caught.value.hint


def test_a_bug_there_is_told_with_its_host() -> None:
    with pytest.raises(PipelineError, match="beta: ZeroDivisionError: division by zero"):
        told(encoded(Answer(Failed("ZeroDivisionError", "division by zero", None))), "beta")


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values()
                                  if isinstance(kind, type) and issubclass(kind, errors.FullpipeError)])
def test_every_error_of_ours_is_told_as_one_of_ours(kind: type[errors.FullpipeError]) -> None:
    """Those that are made of more than a message as what they also are."""
    with pytest.raises(errors.FullpipeError) as caught:
        told(encoded(Answer(Failed(kind.__name__, "m", "h"))), "beta")
    assert issubclass(kind, type(caught.value))
    assert caught.value.exit_code == kind.exit_code or issubclass(kind, errors.Unavailable)
    assert (caught.value.message, caught.value.hint) == ("beta: m", "h")


def test_hosts_that_differ_are_told_by_an_agent_as_an_error_of_the_pipeline() -> None:
    assert type(by_name("HostsDiffer", "m", None)) is PipelineError
    assert by_name("ZeroDivisionError", "m", None) is by_name("re", "m", None) is None


class Silent(Contact):
    """Has two hosts, each of which has a future for an answer."""

    def __init__(self, **answers: Future[bytes]) -> None:
        self.head, self.answers = "alpha", answers
        self.entries = {name: HostEntry(name=name, address=name) for name in answers}

    def begin(self, host: str, request: bytes) -> Future[bytes]:
        return self.answers[host]

    def launcher(self) -> Launcher:
        raise NotImplementedError

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass


def answered(with_: bytes | Exception | None = None) -> Future[bytes]:
    """None: never."""
    future: Future[bytes] = Future()
    if isinstance(with_, Exception):
        future.set_exception(with_)
    elif with_ is not None:
        future.set_result(with_)
    return future


PONG = Agent().do(encoded(Ping()))


@pytest.mark.parametrize(("answer", "says", "hint"), [
    (answered(), "beta has not answered within 0.01 s", "can be reached from here"),
    (answered(b"?"), "beta is not understood here", SAME_EVERYWHERE),
    (answered(RuntimeError("ray::Agent()\nModuleNotFoundError: No module named 'fullpipe.cluster'")),
     "beta is not understood here: ray::Agent()", SAME_EVERYWHERE),
    (answered(RuntimeError("The actor died.\n  class_name: Agent\n  namespace: fullpipe")),
     "beta is lost: The actor died.", "can be reached from here"),
    (answered(ConnectionResetError()), "beta is lost: ConnectionResetError", "can be reached from here")])
def test_a_host_that_does_not_answer_is_named_with_the_way_out(answer: Future[bytes], says: str, hint: str) -> None:
    with pytest.raises(PipelineError) as caught:
        Silent(alpha=answered(PONG), beta=answer).await_agents(0.01)
    assert caught.value.message == says or caught.value.message.startswith(f"{says}:")
    assert caught.value.hint and hint in caught.value.hint


def test_all_that_do_not_answer_are_named() -> None:
    with pytest.raises(PipelineError, match="alpha, beta have not answered"):
        Silent(alpha=answered(), beta=answered()).await_agents(0.01)


def test_hosts_that_answer_are_all_that_is_wanted() -> None:
    Silent(alpha=answered(PONG), beta=answered(PONG)).await_agents(0.01)
