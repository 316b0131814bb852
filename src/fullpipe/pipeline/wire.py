"""How messages travel between processes. Torch is imported only when a torch tensor passes.

Two kinds of road:

- **Control**: `Channel`, a stream socket with length-prefixed JSON frames, between the engine's process
  and each worker.
- **Data**: one hop from stage to stage. `pack` makes a single byte array of a header and the hidden
  rows, `unpack` reads it back:

      uint64 size of all | uint64 size of the header | header, JSON | zeros up to a multiple of 64 |
      raw tensor bytes | zeros up to the size that was asked for

  The raw bytes start at a multiple of 64 so that the receiver views them in place, without a copy,
  whatever their dtype. A receiver that has only the beginning learns from `packed_size` what is missing.

Flights, legs and expansions are written as JSON lists in field order: half the size of objects, and
twice as fast to write.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import sys
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullpipe.messages import ArenaId, Expansion, Flight, Leg, Opening, Part
from fullpipe.request import SamplingParams

Frame = dict[str, Any]
Bytes = NDArray[np.uint8]

_ALIGN = 64
_LENGTH = struct.Struct("<I")
_SIZES = struct.Struct("<QQ")
_READ = 1 << 16
_LONGEST = 1 << 26  # bytes of a frame; a prompt of a million tokens is a third of it
_LARGEST = 1 << 32  # bytes of a hop; hidden rows of the longest prompts and widest models are less


class NonsenseError(Exception):
    """What arrived is no message of ours. Its text completes "station X answers nonsense: "."""


@dataclass(slots=True)
class Arrival:
    """What reaches a station: a flight or job, the legs it has behind it, and its hidden rows.

    sent, size: when it was handed to the link, and its bytes there. due: when it arrives at the other end.
    Both moments in seconds of `time.monotonic`.
    """

    flight: Flight
    legs: list[list[Any]]
    hidden: Any
    sent: float
    size: int
    due: float


def dump_flight(flight: Flight) -> list[Any]:
    """A flight, or draft job, as plain JSON values."""
    return [flight.id, [_dump_part(part) for part in flight.parts],
            [_dump_opening(opening) for opening in flight.opens], flight.closes, flight.fanout]


def load_flight(values: list[Any]) -> Flight:
    """What `dump_flight` wrote."""
    number, parts, opens, closes, fanout = values
    return Flight(number, [Part(*part) for part in parts],
                  [_load_opening(*opening) for opening in opens], closes, fanout)


def _dump_part(part: Part) -> list[Any]:
    return [part.arena, part.commits, part.nodes, part.tokens, part.positions, part.slots, part.paths,
            part.wants]


def _dump_opening(opening: Opening) -> list[Any]:
    return [opening.arena, opening.capacity, opening.prompt_len, opening.params.to_dict(), opening.copy_from,
            opening.copied, opening.request, opening.drafts]


def _load_opening(arena: ArenaId, capacity: int, prompt_len: int, params: dict[str, Any], *rest: Any) -> Opening:
    return Opening(arena, capacity, prompt_len, SamplingParams.from_dict(params), *rest)


def dump_leg(leg: Leg) -> list[Any]:
    """A leg as plain JSON values; `Leg(*values)` reads it back."""
    return [leg.station, leg.start, leg.end, leg.nodes]


def dump_expansion(expansion: Expansion) -> list[Any]:
    """An expansion as plain JSON values; `Expansion(*values)` reads it back."""
    return [expansion.node, expansion.tokens, expansion.logprobs, expansion.parents]


def frame_size(frame: Frame) -> int:
    """How many bytes `Channel.send` writes for a frame."""
    return _LENGTH.size + len(_body(frame))


def _body(frame: Frame) -> bytes:
    return json.dumps(frame, separators=(",", ":")).encode()


def _frame(body: bytearray) -> Frame:
    frame = _read_json(body)
    if type(frame) is not dict:
        raise NonsenseError(f"a frame that is no object but {frame!r:.60}")
    return frame


def _read_json(text: bytes | bytearray) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8 are a ValueError too
        raise NonsenseError(f"{bytes(text[:40])!r}, which is not JSON ({error})") from error


class Channel:
    """JSON frames over a connected stream socket. One thread may receive while any number send."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._unread = bytearray()
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self._sock.fileno()

    def set_timeout(self, seconds: float) -> None:
        """How long `send` may wait for the other end to read."""
        self._sock.settimeout(seconds)

    def send(self, frame: Frame) -> None:
        """Write one frame whole. Raises `OSError` when the other end is gone, and `TimeoutError` (an
        `OSError` too) when it does not read for as long as the socket's timeout says."""
        body = _body(frame)
        with self._sending:
            self._sock.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> list[Frame]:
        """Wait for bytes and return the frames that are whole by now: maybe none. `EOFError` at the end;
        `NonsenseError` for bytes that are no frame, after which nothing can be read any more."""
        try:
            data = self._sock.recv(_READ)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError("the other end closed the connection")
        self._unread += data
        frames: list[Frame] = []
        at, end = 0, len(self._unread)
        while end - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._unread, at)
            if length > _LONGEST:
                raise NonsenseError(f"a frame of {length} bytes, when none has more than {_LONGEST}")
            body = at + _LENGTH.size
            if end - body < length:
                break
            at = body + length
            frames.append(_frame(self._unread[body:at]))
        del self._unread[:at]
        return frames

    def close(self) -> None:
        """Close the socket; a `select` or `receive` waiting on it in another thread wakes."""
        with contextlib.suppress(OSError):  # the other end went first
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def pack(header: Any, hidden: Any, least: int = 0) -> Bytes:
    """One hop as bytes, uint8 [n] with n >= least.

    header: plain JSON values.
    hidden: a NumPy array or torch tensor of any shape and dtype, zero rows included, or None.
    """
    described, raw = _describe(hidden)
    head = json.dumps([header, described], separators=(",", ":")).encode()
    start = _padded(_SIZES.size + len(head))
    end = start + raw.nbytes
    message = np.zeros(max(end, least), dtype=np.uint8)
    _SIZES.pack_into(message.data, 0, end, len(head))
    message[_SIZES.size:_SIZES.size + len(head)] = np.frombuffer(head, dtype=np.uint8)
    message[start:end] = raw
    return message


def packed_size(message: Bytes) -> int:
    """How many bytes `pack` needed, read from the first 16 of them; padding is not counted. Raises `NonsenseError` for
    sizes that cannot be."""
    size, header = _SIZES.unpack_from(message.data, 0)
    if not _SIZES.size + header <= size <= _LARGEST:
        raise NonsenseError(f"a message of {size} bytes with a header of {header}")
    return int(size)


def unpack(message: Bytes) -> tuple[Any, Any]:
    """The header and the hidden rows that `pack` was given; the rows share the message's memory. Raises
    `NonsenseError` for what `pack` never made."""
    end, (_, length) = packed_size(message), _SIZES.unpack_from(message.data, 0)
    head = _read_json(message[_SIZES.size:_SIZES.size + length].tobytes())
    try:
        header, described = head
        return header, _restore(described, message[_padded(_SIZES.size + length):end])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise NonsenseError(f"a message that cannot be read ({type(error).__name__}: {error})") from error


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _describe(hidden: Any) -> tuple[list[Any] | None, Bytes]:
    """What the receiver must know to view the raw bytes again, and those bytes, flat."""
    if hidden is None:
        return None, np.zeros(0, dtype=np.uint8)
    if isinstance(hidden, np.ndarray):
        flat = np.ascontiguousarray(hidden).reshape(-1).view(np.uint8)
        return ["numpy", hidden.dtype.str, list(hidden.shape)], flat
    torch = sys.modules["torch"]  # whoever made the tensor has imported it
    flat = hidden.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return ["torch", str(hidden.dtype).removeprefix("torch."), list(hidden.shape)], flat


def _restore(described: list[Any] | None, raw: Bytes) -> Any:
    if described is None:
        return None
    kind, dtype, shape = described
    if kind == "numpy":
        return raw.view(np.dtype(dtype)).reshape(shape)
    import torch

    return torch.from_numpy(raw).view(getattr(torch, dtype)).reshape(shape)
