"""Who has the keys of the run gets in, and nobody else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import zmq

from fullpipe.pipeline.bell import Bell, Context, Socket
from fullpipe.pipeline.keys import Doorman, RunKeys

KEYS = RunKeys.new()
OTHER = RunKeys.new()
LONG_MS, SHORT_MS = 10_000, 150


@pytest.fixture
def inside() -> Iterator[Context]:
    context = Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def outside() -> Iterator[Context]:
    context = Context()
    yield context
    context.destroy(linger=0)


@contextmanager
def serving(context: Context, keys: RunKeys = KEYS) -> Iterator[tuple[Socket, str]]:
    with context.socket(zmq.PULL) as socket:
        keys.serve(socket)
        yield socket, f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"


@contextmanager
def knocking(context: Context, address: str, with_keys: Callable[[Socket], None]) -> Iterator[None]:
    with context.socket(zmq.PUSH) as socket:
        socket.linger = 0
        with_keys(socket)
        socket.connect(address)
        socket.send(b"hello")
        yield


def test_who_has_the_keys_gets_in(inside: Context, outside: Context) -> None:
    with Doorman(inside, KEYS), serving(inside) as (socket, address), knocking(outside, address, KEYS.connect):
        assert socket.poll(LONG_MS) and socket.recv() == b"hello"


def of_another_run(socket: Socket) -> None:
    OTHER.connect(socket)


def that_knows_the_public_key(socket: Socket) -> None:
    OTHER.connect(socket)
    socket.setsockopt(zmq.CURVE_SERVERKEY, KEYS.public)


def that_claims_to_be_of_the_run(socket: Socket) -> None:
    that_knows_the_public_key(socket)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, KEYS.public)


def without_keys(socket: Socket) -> None:
    pass


def with_a_password(socket: Socket) -> None:
    socket.setsockopt(zmq.PLAIN_USERNAME, b"fullpipe")
    socket.setsockopt(zmq.PLAIN_PASSWORD, b"please")


STRANGERS = (of_another_run, that_knows_the_public_key, that_claims_to_be_of_the_run, without_keys, with_a_password)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_does_not_get_in(inside: Context, outside: Context, stranger: Callable[[Socket], None]) -> None:
    with Doorman(inside, KEYS), serving(inside) as (socket, address), knocking(outside, address, stranger):
        assert not socket.poll(SHORT_MS)
        with knocking(outside, address, KEYS.connect):
            assert socket.poll(LONG_MS), "and those who belong here still do"


def test_nobody_gets_in_without_a_doorman(inside: Context, outside: Context) -> None:
    with serving(inside) as (socket, address), knocking(outside, address, KEYS.connect):
        assert not socket.poll(SHORT_MS)


def test_nobody_is_told_anything_without_the_keys(inside: Context, outside: Context) -> None:
    """A server of another run, at an address of ours, hears nothing from us."""
    with Doorman(inside, OTHER), serving(inside, OTHER) as (socket, address), knocking(outside, address, KEYS.connect):
        assert not socket.poll(SHORT_MS)


def test_keys_are_made_for_each_run_and_keep_their_secret() -> None:
    assert OTHER.public != KEYS.public and len(KEYS.public) == len(KEYS.secret) == 40
    assert KEYS.secret.decode() not in f"{KEYS} {KEYS!r}"


def test_a_context_has_one_doorman_at_a_time(inside: Context) -> None:
    with Doorman(inside, KEYS), pytest.raises(zmq.ZMQError):
        Doorman(inside, KEYS).start()
    with Doorman(inside, KEYS):
        pass
    inside.term()


def test_a_doorman_ends_with_its_context(inside: Context) -> None:
    doorman = Doorman(inside, KEYS)
    doorman.stop()
    doorman.start()
    inside.term()
    doorman.stop()


def test_a_doorman_takes_no_processor_while_nobody_knocks(inside: Context) -> None:
    with Doorman(inside, KEYS):
        time.sleep(0.05)
        before = os.times()
        time.sleep(0.2)
        after = os.times()
    assert after.user + after.system - before.user - before.system <= 0.03


def test_a_bell_is_heard_once_for_each_time_it_rings(inside: Context) -> None:
    bell = Bell(inside)
    for _ in range(2):
        bell.ring()
    with bell.socket as socket:
        assert socket.poll(LONG_MS) and socket.recv() == b""
        assert socket.poll(LONG_MS) and socket.recv() == b""
        assert not socket.poll(0)
    inside.term()
    bell.ring()
