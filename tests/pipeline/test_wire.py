"""Messages survive the road between processes, byte for byte."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from fullpipe.errors import UsageError
from fullpipe.messages import Expansion, Flight, Leg, Opening, Part
from fullpipe.pipeline.cancelled import Cancelled
from fullpipe.pipeline.frames import Broken, Free, FromWorker, Hop, Lost, Stay, TapHop
from fullpipe.pipeline.wire import Channel, frame_size, pack, packed_size, unpack
from fullpipe.request import SamplingParams
from fullpipe.stations.scripted import ScriptedStage
from fullpipe.stations.spec import StationSpec


def _flight() -> Flight:
    part = Part(7, [3, 4], [-1, 12], [5, 151_000], [0, 1], [3, 9], [[], [4, 9]], [False, True])
    params = SamplingParams(temperature=0.7, logit_bias={5: -1.5}, stop=("a", "b"), seed=2**63 + 1)
    return Flight(11, [part, Part(8, [1])], [Opening(7, 2, params)], [6], fanout=4)


def test_headers_return_as_they_were() -> None:
    for header in (Hop(_flight(), [Stay(0.0, 1.25, 2.5, 0.5, [3, 4])]), TapHop(_flight(), [2, 9])):
        assert unpack(pack(header, None), type(header)) == (header, None)


def test_an_opening_keeps_the_path_that_it_begins_with() -> None:
    flight = Flight(0, opens=[Opening(3, 4, SamplingParams(logprobs=2), [4, 0, 9])])
    assert unpack(pack(flight, None), Flight) == (flight, None)


def test_legs_and_expansions_return_as_they_were() -> None:
    for one in (Leg("stage 0", 1.25, 2.5, [3, 4]), Expansion(3, [1, 2], [-0.5, -1.0], [-1, 0])):
        assert unpack(pack(one, None), type(one))[0] == one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_tensor_returns_bit_for_bit(dtype: torch.dtype, rows: int) -> None:
    rng = torch.Generator().manual_seed(rows)
    hidden = (torch.randn(rows, 24, generator=rng) * 50).to(dtype)
    header, back = unpack(pack({"rows": rows}, hidden), dict[str, int])
    assert header == {"rows": rows}
    assert back.dtype == dtype
    assert torch.equal(back, hidden)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_array_returns_bit_for_bit(rows: int) -> None:
    hidden = np.random.default_rng(rows).normal(size=(rows, 4)).astype(np.float32)
    _, back = unpack(pack(None, hidden), None)
    assert isinstance(back, np.ndarray) and back.dtype == np.float32
    assert np.array_equal(back, hidden)


def test_rows_that_are_not_contiguous() -> None:
    wide = torch.arange(64.0).reshape(8, 8)
    _, tensor = unpack(pack(None, wide[:, ::2]), None)
    _, array = unpack(pack(None, wide.numpy()[1::3].T), None)
    assert torch.equal(tensor, wide[:, ::2])
    assert np.array_equal(array, wide.numpy()[1::3].T)


def test_special_numbers_pass() -> None:
    hidden = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-40]], dtype=torch.bfloat16)
    _, back = unpack(pack(None, hidden), None)
    assert torch.equal(back.view(torch.int16), hidden.view(torch.int16))


def test_padding_is_not_content() -> None:
    hidden = torch.ones(2, 3)
    bare, padded = pack(["x"], hidden), pack(["x"], hidden, least=4096)
    assert len(padded) == 4096
    assert packed_size(padded) == packed_size(padded[:16]) == len(bare)
    assert torch.equal(unpack(padded, list[str])[1], hidden)
    assert len(pack(["x"], hidden, least=10)) == len(bare)


def test_received_rows_can_be_written_and_share_memory() -> None:
    message = pack(None, torch.zeros(2, 2))
    _, back = unpack(message, None)
    back += 1
    assert torch.equal(unpack(message, None)[1], torch.ones(2, 2))


Ends = tuple[Channel[Any], Channel[Any], socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Two connected channels, and the socket under the first to write raw bytes to."""
    left, right = socket.socketpair()
    one, other = Channel[Any](left, FromWorker), Channel[Any](right, FromWorker)
    yield one, other, left
    one.close()
    other.close()


def _receive(channel: Channel[Any], count: int) -> list[Any]:
    frames: list[Any] = []
    while len(frames) < count:
        frames += channel.receive()
    return frames


def test_channel_frames_keep_order_and_size(ends: Ends) -> None:
    one, other, _ = ends
    sent = [Broken(f"error {n}", "x" * (n * 40_000)) for n in range(5)]
    sender = threading.Thread(target=lambda: [one.send(frame) for frame in sent])
    sender.start()
    assert _receive(other, 5) == sent
    sender.join()


def test_channel_frame_in_pieces(ends: Ends) -> None:
    _, other, raw = ends
    body = msgspec.msgpack.encode(Free())
    assert frame_size(Free()) == 4 + len(body)
    for byte in len(body).to_bytes(4, "little") + body[:-1]:
        raw.sendall(bytes([byte]))
        assert other.receive() == []
    raw.sendall(body[-1:])
    assert other.receive() == [Free()]


def test_channel_end(ends: Ends) -> None:
    one, other, _ = ends
    one.send(Lost("last"))
    one.close()
    assert other.receive() == [Lost("last")]
    with pytest.raises(EOFError):
        other.receive()
    with pytest.raises(OSError):
        other.send(Free())


def test_channel_does_not_wait_for_ever_for_a_reader(ends: Ends) -> None:
    one, _, _ = ends
    one.set_timeout(0.02)
    with pytest.raises(TimeoutError):
        one.send(Lost("x" * (1 << 22)))


def test_spec_builds_and_travels() -> None:
    args = {"index": 0, "num_stages": 2, "truth": {"kind": "text", "tokens": [4]}}
    spec = StationSpec("fullpipe.stations.scripted:ScriptedStage", args)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=StationSpec) == spec
    assert msgspec.convert(msgspec.to_builtins(spec), StationSpec) == spec
    assert isinstance(spec.build(), ScriptedStage)


@pytest.mark.parametrize("builder", ["os:system", "fullpipe", "fullpipe.x", "fullpipe.x:", "fullpipe.x:a.b",
                                     "fullpipe:LLM", "fullpiped.x:f", ":f", ""])
def test_spec_names_only_functions_of_this_package(builder: str) -> None:
    with pytest.raises(UsageError, match="is not a builder"):
        StationSpec(builder)


@pytest.mark.parametrize("args", [{"x": (1, 2)}, {"x": {1: 2}}, {"x": object()}, {"x": float("nan")}])
def test_spec_takes_plain_values_only(args: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="plain JSON"):
        StationSpec("fullpipe.stations.scripted:ScriptedStage", args)


@pytest.mark.parametrize("builder", ["fullpipe.nowhere:f", "fullpipe.stations.scripted:nobody"])
def test_spec_of_nothing(builder: str) -> None:
    with pytest.raises(UsageError, match="no builder"):
        StationSpec(builder).build()


def test_cancelled_ids_are_taken_once_and_bounded() -> None:
    cancelled = Cancelled(most=4)
    cancelled.add([1, 2, -1])
    assert cancelled.take([2, 3, -1]) == {2}, "prompt rows carry -1, which is nobody's id"
    assert cancelled.take([2]) == set()
    cancelled.add(list(range(10, 20)))
    assert len(cancelled) == 4
    assert cancelled.take(range(20)) == {16, 17, 18, 19}


def test_no_torch_is_needed() -> None:
    code = ("import sys, fullpipe.pipeline.workers, fullpipe.pipeline.worker, fullpipe.stations.scripted;"
            "sys.exit('torch' in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
