"""Messages between processes are lists of frames: a number, a header in msgpack, and the bytes of tensors as they are.

    number, 8 bytes | msgpack of (header, what each tensor is) | bytes of the first tensor | bytes of the second | ...

The number counts the messages of a connection in one direction, so that one that is lost, as it may be when a
connection breaks and comes back, is noticed. Torch is imported only when a torch tensor passes. Nothing that executes
on arrival (pickle) ever travels.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Tensors = Mapping[str, Any]
Frame = Any
"""bytes, or a buffer of such."""

_NUMBER = struct.Struct("<Q")
LONGEST_HEADER = 1 << 26
"""Bytes; a prompt of a million tokens is a third of it."""


class NonsenseError(Exception):
    """Is raised where what arrived is no message of ours. Its text completes "station X answers nonsense: "."""


class Tensor(Struct, array_like=True):
    """Says what the receiver must know to view raw bytes as a tensor again."""

    name: str
    library: Literal["numpy", "torch"]
    dtype: str
    shape: list[Annotated[int, Meta(ge=0)]]


class Outward:
    """Numbers the messages that leave by one connection."""

    def __init__(self) -> None:
        self._next = 0

    def number(self, frames: list[Frame]) -> list[Frame]:
        self._next += 1
        return [_NUMBER.pack(self._next - 1), *frames]


class Inward:
    """Checks the numbers of those that come by one connection."""

    def __init__(self) -> None:
        self._next = 0

    def checked(self, frames: Sequence[Frame]) -> Sequence[Frame]:
        """The frames without their number. Raises `NonsenseError` unless it is the one that is due."""
        if not frames or len(frames[0]) != _NUMBER.size:
            raise NonsenseError(f"{bytes(frames[0][:40]) if frames else b''!r}, which has no number")
        (number,) = _NUMBER.unpack(frames[0])
        if number != self._next:
            raise NonsenseError(f"message {number}, and {self._next} is due: the connection has lost some")
        self._next += 1
        return frames[1:]


@cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)


encode = msgspec.msgpack.Encoder().encode


def decode(data: Frame, kind: Any) -> Any:
    """The struct that `encode` was given. Raises `NonsenseError`."""
    if len(data) > LONGEST_HEADER:
        raise NonsenseError(f"a header of {len(data)} bytes, when none has more than {LONGEST_HEADER}")
    try:
        return _decoder(kind).decode(data)
    except (ValueError, RecursionError) as error:
        raise NonsenseError(f"{bytes(data[:40])!r}, which cannot be read ({error})") from error


def frame_size(frame: Struct) -> int:
    """How many bytes a frame without tensors takes on its way."""
    return _NUMBER.size + len(encode(frame))


def pack(header: Any, tensors: Tensors) -> list[Frame]:
    """The frames of a message, without their number. They are copies: the tensors may change.

    header: a struct, or anything else that msgpack knows.
    tensors: NumPy arrays or torch tensors of any shape and dtype by name, those without rows included.
    """
    described = [_describe(name, tensor) for name, tensor in tensors.items()]
    return [encode((header, [told for told, _ in described])), *(raw.tobytes() for _, raw in described)]


def unpack(frames: Sequence[Frame], kind: Any) -> tuple[Any, dict[str, Any]]:
    """The header, of type `kind`, and the tensors that `pack` was given; they may be written to. Raises `NonsenseError`
    for what `pack` never made."""
    if not frames:
        raise NonsenseError("a message without frames")
    header, described = decode(frames[0], tuple[kind, list[Tensor]])
    if len(described) != len(frames) - 1:
        raise NonsenseError(f"{len(frames) - 1} tensors, and {len(described)} are described")
    try:
        return header, {told.name: _restore(told, raw) for told, raw in zip(described, frames[1:])}
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise NonsenseError(f"a tensor that cannot be read ({type(error).__name__}: {error})") from error


def _describe(name: str, tensor: Any) -> tuple[Tensor, Bytes]:
    """What the receiver must know, and the raw bytes, flat."""
    shape = list(tensor.shape)
    if isinstance(tensor, np.ndarray):
        return Tensor(name, "numpy", tensor.dtype.str, shape), np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    torch = sys.modules["torch"]  # whoever made the tensor has imported it
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return Tensor(name, "torch", str(tensor.dtype).removeprefix("torch."), shape), flat


def _restore(told: Tensor, raw: Frame) -> Any:
    # A copy: what ZeroMQ hands out may lie at any address, and kernels want numbers at addresses that they divide.
    array = np.frombuffer(raw, np.uint8).copy()
    if told.library == "numpy":
        return array.view(np.dtype(told.dtype)).reshape(told.shape)
    import torch

    dtype = getattr(torch, told.dtype)
    if not array.size:  # torch views no empty array as another type
        return torch.empty(0, dtype=dtype).reshape(told.shape)
    return torch.from_numpy(array).view(dtype).reshape(told.shape)
