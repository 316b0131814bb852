"""Two ends of this machine measure what lies between them. 127.0.0.2 is another address of it, as of another host."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.cluster.links import Pair
from fullpipe.cluster.reach import PIECE, Echo, bandwidth_of, measure
from fullpipe.errors import PipelineError, UsageError
from fullpipe.pipeline.keys import RunKeys

KEYS = RunKeys.new()


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo("127.0.0.2", 0, KEYS) as echo:
        yield echo


def test_a_way_within_this_machine_is_short_and_wide(echo: Echo) -> None:
    begun = time.monotonic()
    pair = measure("127.0.0.2", echo.port, KEYS)
    assert 0 < pair.latency_s < 0.01 and pair.bandwidth > 10e6
    assert time.monotonic() - begun < 3


def test_several_may_measure_at_once(echo: Echo) -> None:
    found: list[Pair] = []
    threads = [threading.Thread(target=lambda: found.append(measure("127.0.0.2", echo.port, KEYS))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3


def test_it_works_over_the_newer_kind_of_address() -> None:
    if not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("this machine has no IPv6")
    with Echo("::1", 0, KEYS) as echo:
        assert measure("::1", echo.port, KEYS).latency_s > 0


def test_it_listens_at_its_address_and_nowhere_else(echo: Echo) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", echo.port), timeout=5)


def test_its_port_is_free_when_it_is_closed() -> None:
    with Echo("127.0.0.2", 0, KEYS) as first:
        measure("127.0.0.2", first.port, KEYS)
    with Echo("127.0.0.2", first.port, KEYS) as second:
        assert second.port == first.port
    second.close()


def test_a_port_in_use_is_refused_and_leaves_nothing_behind(echo: Echo) -> None:
    before = threading.active_count()
    with pytest.raises(UsageError, match=rf"port {echo.port} of 127.0.0.2 is in use") as caught:
        Echo("127.0.0.2", echo.port, KEYS)
    assert "0 takes any that is free" in str(caught.value.hint)
    assert threading.active_count() == before


@pytest.mark.parametrize("address", ["203.0.113.9", "0.0.0.0", "*", "eth0"])
def test_an_address_that_is_none_of_this_machine_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="no address") as caught:
        Echo(address, 0, KEYS)
    assert "lo: 127.0.0.1" in str(caught.value.hint)


# ---- no answer -------------------------------------------------------------------------------------------------------


def test_keys_of_another_run_are_refused_at_once(echo: Echo) -> None:
    begun = time.monotonic()
    said = rf"beta at 127.0.0.2, port {echo.port}, does not have the keys of this run"
    with pytest.raises(PipelineError, match=said):
        measure("127.0.0.2", echo.port, RunKeys.new(), name="beta", timeout_s=30)
    assert time.monotonic() - begun < 5
    assert measure("127.0.0.2", echo.port, KEYS).latency_s > 0, "nobody else is disturbed"


def test_who_knows_the_public_key_alone_is_refused_at_once(echo: Echo) -> None:
    class Thief(RunKeys, frozen=True):
        def connect(self, socket: zmq.Socket[bytes]) -> None:
            RunKeys.new().connect(socket)
            socket.setsockopt(zmq.CURVE_SERVERKEY, KEYS.public)

    with pytest.raises(PipelineError, match="does not have the keys of this run"):
        measure("127.0.0.2", echo.port, Thief(KEYS.public, KEYS.secret), timeout_s=30)


def test_a_port_at_which_nobody_listens_is_told_so(echo: Echo) -> None:
    with pytest.raises(PipelineError, match=rf"at 127.0.0.1, port {echo.port}, refuses connections") as caught:
        measure("127.0.0.1", echo.port, KEYS, timeout_s=0.1)
    assert "Look whether Fullpipe runs on the host" in str(caught.value.hint)


def test_somebody_who_says_nothing_is_told_so() -> None:
    with socket.create_server(("127.0.0.2", 0)) as dumb:
        port = dumb.getsockname()[1]
        with pytest.raises(PipelineError, match=rf"port {port}, takes connections and says nothing for 0.1 s"):
            measure("127.0.0.2", port, KEYS, timeout_s=0.1)


def test_a_host_that_falls_silent_is_told_so(echo: Echo) -> None:
    begun = threading.Timer(0.05, echo.close)
    begun.start()
    with pytest.raises(PipelineError, match=r"answered first and is now silent for 0\.2 s"):
        while True:
            measure("127.0.0.2", echo.port, KEYS, timeout_s=0.2)
    begun.join()


def test_nonsense_of_those_who_have_the_keys_is_passed_over(echo: Echo) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as odd:
        odd.linger = 0
        KEYS.connect(odd)
        odd.connect(f"tcp://127.0.0.2:{echo.port}")
        for frames in ([b""], [b"ping", b"more"], [b"more"], [b"pong"], [b"x" * 100_000]):
            odd.send_multipart(frames)
        assert measure("127.0.0.2", echo.port, KEYS).latency_s > 0


def test_an_echo_takes_no_processor_while_nobody_asks(echo: Echo) -> None:
    time.sleep(0.05)
    before = os.times()
    time.sleep(0.2)
    after = os.times()
    assert after.user + after.system - before.user - before.system <= 0.03


# ---- what gaps say ---------------------------------------------------------------------------------------------------

GAP = 1e-3  # of a line of 16 MB/s


def line(gaps: list[float], round_trip: float) -> float:
    return bandwidth_of(gaps, round_trip) * GAP / PIECE


def test_even_gaps_say_the_bandwidth() -> None:
    assert line([GAP] * 7, 0.0) == line([GAP] * 7, 1.0) == pytest.approx(1.0)
    assert bandwidth_of([0.0] * 7, 1e-4) < float("inf")


def test_waiting_for_a_window_does_not_count() -> None:
    """Gaps of TCP that starts on a line of 100 ms each way."""
    assert line([GAP, 0.18, GAP, GAP, GAP, 0.15, *[GAP] * 8], 0.2) == pytest.approx(1.0)


def test_an_end_that_was_late_counts() -> None:
    """Four pieces waited for it and are read at once."""
    assert line([GAP] * 9 + [4 * GAP + 1e-5, 1e-6, 1e-6, 1e-6] + [GAP] * 9, 0.005) == pytest.approx(1.0, rel=0.05)


def test_a_stutter_of_a_short_line_counts() -> None:
    assert line([GAP] * 9 + [11 * GAP], 1e-4) == pytest.approx(0.5)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=40), st.floats(0, 1))
def test_a_line_is_as_wide_as_some_of_its_gaps(gaps: list[float], round_trip: float) -> None:
    found = bandwidth_of(gaps, round_trip)
    assert 0.999 * PIECE / max([*gaps, 1e-7]) <= found <= 1.001 * PIECE / max(min(gaps), 1e-7)
