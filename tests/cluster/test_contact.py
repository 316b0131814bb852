"""A contact knows who is there, for whichever thread asks. Ray and its agents are imagined."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import pytest

from fullpipe.cluster import contact as contacts
from fullpipe.cluster.agent import Agent, Answer, Ping
from fullpipe.cluster.contact import RayContact
from fullpipe.cluster.hosts import HostEntry
from fullpipe.errors import PipelineError
from fullpipe.pipeline.launch.ray import Node

GIB = 1 << 30


class _Ref:
    """Is what Ray hands out for an answer that comes."""

    def __init__(self, answer: bytes | Exception | None) -> None:
        self._answer = answer

    def future(self) -> Future[bytes]:
        found = Future[bytes]()
        if isinstance(self._answer, Exception):
            found.set_exception(self._answer)
        elif self._answer is not None:
            found.set_result(self._answer)
        return found


class _Actor:
    """Answers at once, or never, or is dead."""

    def __init__(self, cluster: FakeCluster, node: str) -> None:
        self.do, self._cluster, self._node = self, cluster, node

    def remote(self, request: bytes) -> _Ref:
        if self in self._cluster.dead:
            return _Ref(ChildProcessError("the actor died"))
        return _Ref(None if self._node in self._cluster.hung else Agent().do(request))


class FakeCluster:
    """Has the nodes that it is given; the first is this machine's. hung: their ids, where nobody answers."""

    def __init__(self, *names: str) -> None:
        self.have(*names)
        self.hung: set[str] = set()
        self.dead: list[_Actor] = []
        self.actors: list[_Actor] = []

    def have(self, *names: str) -> None:
        """A name may say that its node is a new one: "b'" """
        self.there = [Node(f"node of {name}", f"10.0.0.{number}", name.strip("'"), number == 1,
                           {"CPU": 4.0, "memory": 3.0 * GIB}) for number, name in enumerate(names, 1)]

    def nodes(self) -> list[Node]:
        return self.there

    def actor(self, kind: type, node: str) -> _Actor:
        self.actors.append(_Actor(self, node))
        return self.actors[-1]

    def is_dead(self, error: Exception) -> bool:
        return isinstance(error, ChildProcessError)

    def close(self) -> None:
        pass


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    made = FakeCluster("a", "b", "c")
    monkeypatch.setattr(contacts, "Cluster", lambda address: made)
    return made


SAID: dict[str, Any] = {"interface": "eth1", "host_ip": "10.1.0.1", "port": 5600}
WANTED = [HostEntry(name="alpha", address="10.0.0.1", cores=2), HostEntry(name="beta", address="10.0.0.2", port=5700)]


@pytest.mark.parametrize("wanted", [None, WANTED])
def test_a_refresh_keeps_what_was_said_of_the_head(cluster: FakeCluster, wanted: list[HostEntry] | None) -> None:
    contact = RayContact(wanted=wanted, own=SAID)
    for _ in range(2):
        head, other = (entry for entry in list(contact.entries.values())[:2])
        assert {name: getattr(head, name) for name in SAID} == SAID and head.name == contact.head
        assert head.cores == (2 if wanted else None), "and what the file says besides"
        assert other.interface is None and other.port == (5700 if wanted else 0)
        contact.refresh()


def test_a_refresh_leaves_alone_what_somebody_reads(cluster: FakeCluster) -> None:
    contact = RayContact()
    read = iter(contact.entries)
    assert next(read) == "a"
    cluster.have("a", "c")
    contact.refresh()
    assert list(read) == ["b", "c"], "as it was"
    assert list(contact.entries) == ["a", "c"]


def test_a_host_that_has_gone_since_it_was_seen_is_lost(cluster: FakeCluster) -> None:
    contact = RayContact()
    cluster.have("a", "b")
    contact.refresh()
    found = contact.try_all({"a": Ping(), "c": Ping()}, 1.0)
    assert isinstance(found["a"], Answer)
    assert isinstance(found["c"], PipelineError) and found["c"].message == "c is lost: it is not there any more"
    assert contact.cores("c") is None and contact.memory("c") == 0 and contact.life("c") == ""


def test_hosts_that_do_not_answer_are_waited_for_together(cluster: FakeCluster) -> None:
    contact = RayContact()
    cluster.hung = {"node of b", "node of c"}
    begun = time.monotonic()
    assert contact.answering(0.3) == ["a"]
    assert time.monotonic() - begun < 0.55


def test_only_a_node_that_is_new_has_a_new_agent_and_another_life(cluster: FakeCluster) -> None:
    contact = RayContact()
    contact.refresh()
    lives = [contact.life(host) for host in "abc"]
    assert len(cluster.actors) == 3
    cluster.have("a", "b'", "c")
    contact.refresh()
    assert len(cluster.actors) == 4
    assert [contact.life(host) == life for host, life in zip("abc", lives)] == [True, False, True]


def test_an_agent_that_has_died_is_started_again_where_its_host_is_there(cluster: FakeCluster) -> None:
    contact = RayContact()
    cluster.dead.append(cluster.actors[1])
    assert contact.answering() == ["a", "c"]
    assert len(cluster.actors) == 4 and contact.answering() == ["a", "b", "c"]


def test_ray_keeps_account_of_memory(cluster: FakeCluster) -> None:
    assert RayContact().memory("b") == 3 * GIB
