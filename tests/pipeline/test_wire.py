"""Messages survive the road between processes, byte for byte."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from fullpipe.errors import UsageError
from fullpipe.messages import Expansion, Flight, Leg, Opening, Part
from fullpipe.pipeline.cancelled import Cancelled
from fullpipe.pipeline.frames import Free, FromWorker, Hop, Stay, TapHop
from fullpipe.pipeline.wire import Inward, NonsenseError, Outward, decode, encode, frame_size, pack, unpack
from fullpipe.request import SamplingParams
from fullpipe.stations.scripted import ScriptedStage
from fullpipe.stations.spec import StationSpec


def _flight() -> Flight:
    part = Part(7, [3, 4], [-1, 12], [5, 151_000], [0, 1], [3, 9], [[], [4, 9]], [False, True])
    params = SamplingParams(temperature=0.7, logit_bias={5: -1.5}, stop=("a", "b"), seed=2**63 + 1)
    return Flight(11, [part, Part(8, [1])], [Opening(7, 2, params)], [6], fanout=4)


def test_headers_return_as_they_were() -> None:
    for header in (Hop(_flight(), [Stay(0.0, 1.25, 2.5, 0.5, [3, 4])]), TapHop(_flight(), [2, 9])):
        assert unpack(pack(header, {}), type(header)) == (header, {})


def test_an_opening_keeps_the_path_that_it_begins_with() -> None:
    flight = Flight(0, opens=[Opening(3, 4, SamplingParams(logprobs=2), [4, 0, 9])])
    assert unpack(pack(flight, {}), Flight) == (flight, {})


def test_legs_and_expansions_return_as_they_were() -> None:
    for one in (Leg("stage 0", 1.25, 2.5, [3, 4]), Expansion(3, [1, 2], [-0.5, -1.0], [-1, 0])):
        assert unpack(pack(one, {}), type(one))[0] == one


def test_a_frame_without_tensors_is_as_large_as_its_message() -> None:
    assert frame_size(Free()) == sum(map(len, Outward().number([encode(Free())])))
    assert decode(encode(Free()), FromWorker) == Free()


def _there_and_back(tensor: Any) -> Any:
    return unpack(pack(None, {"rows": tensor}), None)[1]["rows"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_tensor_returns_bit_for_bit(dtype: torch.dtype, rows: int) -> None:
    rng = torch.Generator().manual_seed(rows)
    hidden = (torch.randn(rows, 24, generator=rng) * 50).to(dtype)
    header, back = unpack(pack({"rows": rows}, {"hidden": hidden}), dict[str, int])
    assert header == {"rows": rows}
    assert back["hidden"].dtype == dtype
    assert torch.equal(back["hidden"], hidden)


def test_several_tensors_keep_their_names_and_their_order() -> None:
    sent = {"hidden": torch.ones(3, 2, dtype=torch.bfloat16), "residual": np.arange(6.0).reshape(3, 2),
            "positions": np.arange(3), "": np.zeros((0, 4), np.int8)}
    frames = pack(["x"], sent)
    assert len(frames) == 1 + len(sent)
    header, back = unpack(frames, list[str])
    assert header == ["x"] and list(back) == list(sent)
    for name, tensor in sent.items():
        assert type(back[name]) is type(tensor) and back[name].dtype == tensor.dtype
        assert back[name].tolist() == tensor.tolist() and back[name].shape == tensor.shape


ARRAYS = arrays(st.sampled_from(["<f4", "<f2", "<f8", "|i1", "|u1", "<i4", "<i8", ">f4", "|b1", "<c8"]),
                array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))


@given(st.dictionaries(st.text(max_size=6), ARRAYS, max_size=4), st.integers(0, 7))
def test_named_arrays_return_bit_for_bit_from_any_address(sent: dict[str, NDArray[Any]], shift: int) -> None:
    frames = [memoryview(b"#" * shift + frame)[shift:] for frame in pack("header", sent)]
    header, back = unpack(frames, str)
    assert header == "header" and list(back) == list(sent)
    for name, array in sent.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes()
        assert back[name].flags.aligned and back[name].flags.writeable and back[name].flags.c_contiguous


@given(st.binary(max_size=64).filter(lambda raw: len(raw) % 2 == 0), st.integers(0, 7))
def test_tensors_return_bit_for_bit_from_any_address(raw: bytes, shift: int) -> None:
    sent = torch.tensor(list(raw), dtype=torch.uint8).view(torch.bfloat16)
    frames = [memoryview(b"#" * shift + frame)[shift:] for frame in pack(None, {"rows": sent})]
    back = unpack(frames, None)[1]["rows"]
    assert back.dtype == torch.bfloat16 and back.data_ptr() % 2 == 0
    assert back.view(torch.int16).tolist() == sent.view(torch.int16).tolist()


def test_rows_that_are_not_contiguous() -> None:
    wide = torch.arange(64.0).reshape(8, 8)
    assert torch.equal(_there_and_back(wide[:, ::2]), wide[:, ::2])
    assert np.array_equal(_there_and_back(wide.numpy()[1::3].T), wide.numpy()[1::3].T)


def test_special_numbers_pass() -> None:
    hidden = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-40]], dtype=torch.bfloat16)
    assert torch.equal(_there_and_back(hidden).view(torch.int16), hidden.view(torch.int16))


def test_what_was_packed_does_not_change_with_its_tensor() -> None:
    rows = torch.zeros(2, 2)
    frames = pack(None, {"rows": rows})
    rows += 1
    assert torch.equal(unpack(frames, None)[1]["rows"], torch.zeros(2, 2))


def test_received_rows_can_be_written_to_alone() -> None:
    frames = pack(None, {"rows": torch.zeros(2, 2), "more": torch.zeros(2, 2)})
    back = unpack(frames, None)[1]
    back["rows"] += 1
    assert torch.equal(back["more"], torch.zeros(2, 2))
    assert torch.equal(unpack(frames, None)[1]["rows"], torch.zeros(2, 2))


def test_numbered_messages_are_checked_and_lose_their_number() -> None:
    outward, inward = Outward(), Inward()
    for body in ([b"one"], [], [b"two", b"parts"]):
        assert inward.checked(outward.number(body)) == body


@given(st.lists(st.integers(0, 5), max_size=6))
def test_numbers_are_taken_in_order_without_a_gap_only(numbers: list[int]) -> None:
    inward, outward = Inward(), Outward()
    messages = [outward.number([bytes([number])]) for number in range(6)]
    for due, number in enumerate(numbers):
        if number != due:
            with pytest.raises(NonsenseError, match=f"message {number}, and {due} is due"):
                inward.checked(messages[number])
            break
        assert inward.checked(messages[number]) == [bytes([number])]


@pytest.mark.parametrize("frames", [[], [b""], [b"1234567"], [b"123456789", b"body"]])
def test_a_message_without_a_number_is_nonsense(frames: list[bytes]) -> None:
    with pytest.raises(NonsenseError, match="has no number"):
        Inward().checked(frames)


def test_a_header_that_is_too_long_is_nonsense() -> None:
    with pytest.raises(NonsenseError, match="a header of"):
        decode(bytes((1 << 26) + 1), FromWorker)


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
