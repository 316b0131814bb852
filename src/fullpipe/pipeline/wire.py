"""Bytes travel between processes. Torch is imported only when a torch tensor passes.

- **Control**: `Channel`, a stream socket with length-prefixed frames, between the engine's process and each worker.
- **Data**: one hop from worker to worker. `pack` makes a single byte array of a header and the hidden rows, `unpack`
  reads it back:

      uint64 size of all | uint64 size of the header | header, msgpack | zeros up to a multiple of 64 |
      raw tensor bytes | zeros up to the size that was asked for

  The raw bytes start at a multiple of 64 so that the receiver views them in place, without a copy, whatever their
  dtype. A receiver that has only the beginning learns from `packed_size` what is missing.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
from functools import cache
from typing import Any, Generic, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
T = TypeVar("T")

_ALIGN = 64
_LENGTH = struct.Struct("<I")
_SIZES = struct.Struct("<QQ")
_READ = 1 << 16
_LONGEST = 1 << 26  # bytes of a frame; a prompt of a million tokens is a third of it
_LARGEST = 1 << 32  # bytes of a hop; hidden rows of the longest prompts and widest models are less


class NonsenseError(Exception):
    """Is raised where what arrived is no message of ours. Its text completes "station X answers nonsense: "."""


def frame_size(frame: Struct) -> int:
    """How many bytes `Channel.send` writes for a frame."""
    return _LENGTH.size + len(msgspec.msgpack.encode(frame))


@cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)


def _read(data: Any, kind: Any) -> Any:
    try:
        return _decoder(kind).decode(data)
    except (ValueError, RecursionError) as error:
        raise NonsenseError(f"{bytes(data[:40])!r}, which cannot be read ({error})") from error


class Channel(Generic[T]):
    """Sends and receives frames over a connected stream socket. One thread may receive while any number send.

    kind: of what is received, a struct or a union of tagged ones.
    """

    def __init__(self, sock: socket.socket, kind: Any) -> None:
        self._sock, self._kind = sock, kind
        self._unread = bytearray()
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self._sock.fileno()

    def set_timeout(self, seconds: float) -> None:
        """How long `send` may wait for the other end to read."""
        self._sock.settimeout(seconds)

    def send(self, frame: Struct) -> None:
        """Write one frame whole. Raises `OSError` when the other end is gone, and `TimeoutError` (an
        `OSError` too) when it does not read for as long as the socket's timeout says."""
        body = msgspec.msgpack.encode(frame)
        with self._sending:
            self._sock.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> list[T]:
        """Wait for bytes and return the frames that are whole by now: maybe none. `EOFError` at the end;
        `NonsenseError` for bytes that are no frame, after which nothing can be read any more."""
        try:
            data = self._sock.recv(_READ)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError("the other end closed the connection")
        self._unread += data
        frames: list[T] = []
        at, end = 0, len(self._unread)
        while end - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._unread, at)
            if length > _LONGEST:
                raise NonsenseError(f"a frame of {length} bytes, when none has more than {_LONGEST}")
            body = at + _LENGTH.size
            if end - body < length:
                break
            at = body + length
            frames.append(_read(self._unread[body:at], self._kind))
        del self._unread[:at]
        return frames

    def close(self) -> None:
        """Close the socket; a `select` or `receive` waiting on it in another thread wakes."""
        with contextlib.suppress(OSError):  # the other end went first
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class Rows(Struct, array_like=True):
    """Says what the receiver must know to view raw bytes as hidden rows again."""

    library: Literal["numpy", "torch"]
    dtype: str
    shape: list[int]


def pack(header: Any, hidden: Any, least: int = 0) -> Bytes:
    """One hop as bytes, uint8 [n] with n >= least.

    header: a struct, or anything else that msgpack knows.
    hidden: a NumPy array or torch tensor of any shape and dtype, zero rows included, or None.
    """
    rows, raw = _describe(hidden)
    head = msgspec.msgpack.encode((header, rows))
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


def unpack(message: Bytes, kind: Any) -> tuple[Any, Any]:
    """The header, of type `kind`, and the hidden rows that `pack` was given; the rows share the message's memory.
    Raises `NonsenseError` for what `pack` never made."""
    end, (_, length) = packed_size(message), _SIZES.unpack_from(message.data, 0)
    header, rows = _read(message[_SIZES.size:_SIZES.size + length].data, tuple[kind, Rows | None])
    try:
        return header, _restore(rows, message[_padded(_SIZES.size + length):end])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise NonsenseError(f"rows that cannot be read ({type(error).__name__}: {error})") from error


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _describe(hidden: Any) -> tuple[Rows | None, Bytes]:
    """What the receiver must know, and the raw bytes, flat."""
    if hidden is None:
        return None, np.zeros(0, dtype=np.uint8)
    shape = list(hidden.shape)
    if isinstance(hidden, np.ndarray):
        return Rows("numpy", hidden.dtype.str, shape), np.ascontiguousarray(hidden).reshape(-1).view(np.uint8)
    torch = sys.modules["torch"]  # whoever made the tensor has imported it
    flat = hidden.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return Rows("torch", str(hidden.dtype).removeprefix("torch."), shape), flat


def _restore(rows: Rows | None, raw: Bytes) -> Any:
    if rows is None:
        return None
    if rows.library == "numpy":
        return raw.view(np.dtype(rows.dtype)).reshape(rows.shape)
    import torch

    return torch.from_numpy(raw).view(getattr(torch, rows.dtype)).reshape(rows.shape)
