"""The native kernels for few rows on a CPU: a small library in C beside this file, loaded here and nowhere else.

Its structs (`native.h`) are mirrored below. Functions take addresses; who owns the memory keeps it.

    native = load()            # None: the library was not built here
    native.level               # "avx512"
"""

from __future__ import annotations

import ctypes
import enum
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path

from fullpipe.errors import UsageError

LEVELS = ("avx512", "avxvnni", "avx2", "portable")
"""Levels of instructions, the fastest first."""

ASKED = "FULLPIPE_KERNELS"
"""The environment variable that names the level to use, for tests."""


class Form(enum.IntEnum):
    """How a weight is stored; names are those of GGUF."""

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, F32, F16, BF16 = range(11)

    @property
    def is_float(self) -> bool:
        """Whether rows go into its product as they are, not quantised."""
        return self >= Form.F32


class CacheKind(enum.IntEnum):
    """In what a cache keeps keys and values: `fp_cache`."""

    FLOAT32, FLOAT16, INT8 = range(3)


class Weight(Structure):
    """A matrix in tiles. quants, scales, bias: addresses; bias is float32 [outputs], or None."""

    _fields_ = (("form", c_int32), ("outputs", c_int32), ("inputs", c_int32), ("quants", c_void_p),
                ("scales", c_void_p), ("bias", c_void_p))


class Layer(Structure):
    """Weights of one layer; norms are float32 [hidden], those of heads [head_dim] or None."""

    _fields_ = (*((name, c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
                *((name, Weight) for name in ("query", "key", "value", "out", "gate", "up", "down")))


class Model(Structure):
    """Some layers, and what they share; see `fp_model`. `Kernels.release` gives its memory back."""

    _fields_ = (*((name, c_int32) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "size",
                                               "intermediate", "kind")),
                ("eps", c_float), ("layer", POINTER(Layer)), ("cache", c_void_p), ("slots", c_int64),
                ("cosine", c_void_p), ("sine", c_void_p), ("angles", c_int64), ("memory", c_void_p), ("bytes", c_int64))


class Step(Structure):
    """The rows of a step; see `fp_step`."""

    _fields_ = (("rows", c_int64), ("count", c_int64),
                *((name, c_void_p) for name in ("positions", "slots", "reads", "spans")))


class Kernels:
    """The library's functions. One step at a time on a `Model`; anything else may run beside it.

    Raises UsageError when the environment asks for a level that is unknown or that the processor does not have.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name, result, arguments in _FUNCTIONS:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.levels = tuple(level for level in LEVELS if library.fp_choose(level.encode()))
        self.level = ""
        self.choose(os.environ.get(ASKED) or self.levels[0])

    def choose(self, level: str) -> None:
        """Use a level of instructions for all that follows. Results do not depend on it, bit by bit."""
        if level not in LEVELS:
            raise UsageError(f"{ASKED} names an unknown level {level!r}", hint=f"Known are: {', '.join(LEVELS)}.")
        if level not in self.levels:
            raise UsageError(f"{ASKED} asks for {level}, which this processor does not have",
                             hint=f"It has: {', '.join(self.levels)}. Unset the variable for the best of them.")
        self._library.fp_choose(level.encode())
        self.level = level

    @contextmanager
    def at(self, level: str) -> Iterator[None]:
        """Use another level for a while."""
        before = self.level
        self.choose(level)
        try:
            yield
        finally:
            self.choose(before)

    def row_bytes(self, form: Form, inputs: int) -> int:
        """Bytes of a row in a file."""
        return int(self._library.fp_row_bytes(form, inputs))

    def sizes(self, form: Form, outputs: int, inputs: int) -> tuple[int, int]:
        """Bytes of a weight's numbers and of its scales, in tiles."""
        return (int(self._library.fp_quant_bytes(form, outputs, inputs)),
                int(self._library.fp_scales_bytes(form, outputs, inputs)))

    def cached_bytes(self, kind: CacheKind, size: int) -> int:
        """Bytes of a head's keys or values of one slot. size: its numbers, a multiple of 16."""
        return int(self._library.fp_cached_bytes(kind, size))

    def repack(self, weight: Weight, first: int, rows: int, raw: int) -> bool:
        """Put rows of a file, at address raw, into the tiles of output channels first, first + 1, ...; whether all
        their numbers are finite. Calls for the same tile must not run at the same time."""
        return bool(self._library.fp_repack(byref(weight), first, rows, raw))

    def anew(self, form: Form, x: int, rows: int, inputs: int, out: int) -> None:
        """Put weights that came as floats into blocks as a file has them, of Q8_0 or Q4_1. x: float32 [rows, inputs],
        numbers that fit into halves; out: [rows, row_bytes]."""
        assert form in (Form.Q8_0, Form.Q4_1)
        self._library.fp_anew(form, x, rows, inputs, out)

    def look_up(self, weight: Weight, which: int, count: int, out: int) -> None:
        """Give output channels as floats. which: int64 [count]; out: float32 [count, inputs]."""
        self._library.fp_look_up(byref(weight), which, count, out)

    def product(self, weight: Weight, x: int, rows: int, out: int, threads: int) -> None:
        """x W^T + bias. x: float32 [rows, inputs]; out: float32 [rows, outputs]."""
        _check(self._library.fp_product(byref(weight), x, rows, out, threads))

    def quantised(self, x: int, count: int, q: int, scales: int) -> None:
        """Quantise as products do. x: float32 [count]; q: int8 [count]; scales: float32 [count / 32]."""
        self._library.fp_quantised(x, count, q, scales)

    def run(self, model: Model, step: Step, hidden: int, taps: tuple[int, ...], tapped: int, threads: int) -> None:
        """Run all layers. hidden: float32 [rows, hidden], in place.

        taps: after how many layers of these a copy goes to tapped, float32 [rows, taps, hidden]; rising.
        """
        wanted = (c_int32 * len(taps))(*taps)
        _check(self._library.fp_run(byref(model), byref(step), hidden, wanted, len(taps), tapped, threads))

    def logits(self, head: Weight, norm: int, eps: float, hidden: int, rows: int, out: int, threads: int) -> None:
        """Final norm and head. hidden: float32 [rows, inputs]; out: float32 [rows, outputs]."""
        _check(self._library.fp_logits(byref(head), norm, eps, hidden, rows, out, threads))

    def words_of(self, seed: int, position: int, tokens: int, count: int, words: int) -> None:
        """Draw the random words of some tokens (see `noise.c`). tokens: int64 [count]; words: uint64 [count]."""
        self._library.fp_words_of(seed, position, tokens, count, words)

    def words_from(self, seed: int, position: int, vocab: int, least: int, room: int, tokens: int, words: int) -> int:
        """Draw all words below `vocab`, and give those that are `least` or more; how many there are.

        tokens: int64 [room], rising; words: uint64 [room]. What is beyond room is counted only.
        """
        return int(self._library.fp_words_from(seed, position, vocab, least, room, tokens, words))

    def masked(self, given: int, size: int, may_follow: int, known: int, out: int) -> bool:
        """Copy logits, -inf where a token may not follow; whether anything else is left. given, out: float32 [size].
        may_follow: a bit for each of `known` tokens, a multiple of 8; others may not."""
        return bool(self._library.fp_masked(given, size, may_follow, known, out))

    def release(self, model: Model) -> None:
        """Give back what `run` took."""
        self._library.fp_release(byref(model))

    def read(self, where: int, count: int) -> None:
        """Read so many bytes, a multiple of 512, for measuring how long it takes."""
        self._library.fp_read(where, count)

    def spin(self, count: int, *, floats: bool = False) -> float:
        """Do nothing but multiply bytes, or floats; how many products."""
        return float(self._library.fp_spin(count, floats))


_WEIGHT = POINTER(Weight)
_FUNCTIONS = (
    ("fp_choose", c_int, (c_char_p,)),
    ("fp_row_bytes", c_int64, (c_int, c_int)),
    ("fp_quant_bytes", c_int64, (c_int, c_int, c_int)),
    ("fp_scales_bytes", c_int64, (c_int, c_int, c_int)),
    ("fp_cached_bytes", c_int64, (c_int, c_int)),
    ("fp_repack", c_int, (_WEIGHT, c_int, c_int, c_void_p)),
    ("fp_anew", None, (c_int, c_void_p, c_int, c_int, c_void_p)),
    ("fp_look_up", None, (_WEIGHT, c_void_p, c_int, c_void_p)),
    ("fp_product", c_int, (_WEIGHT, c_void_p, c_int, c_void_p, c_int)),
    ("fp_quantised", None, (c_void_p, c_int, c_void_p, c_void_p)),
    ("fp_run", c_int, (POINTER(Model), POINTER(Step), c_void_p, POINTER(c_int32), c_int, c_void_p, c_int)),
    ("fp_logits", c_int, (_WEIGHT, c_void_p, c_float, c_void_p, c_int, c_void_p, c_int)),
    ("fp_words_of", None, (c_uint64, c_uint64, c_void_p, c_int64, c_void_p)),
    ("fp_words_from", c_int64, (c_uint64, c_uint64, c_int64, c_uint64, c_int64, c_void_p, c_void_p)),
    ("fp_masked", c_int, (c_void_p, c_int64, c_void_p, c_int64, c_void_p)),
    ("fp_release", None, (POINTER(Model),)),
    ("fp_read", c_int32, (c_void_p, c_int64)),
    ("fp_spin", c_double, (c_int64, c_int)),
)


def _check(outcome: int) -> None:
    if outcome == 0:
        raise MemoryError("the system gives no more memory for a step")
    assert outcome > 0, "a row reads no whole path"


@cache
def load() -> Kernels | None:
    """The kernels; None where they were not built, or were built for another system. See `Kernels` for errors."""
    for file in sorted(Path(__file__).parent.glob("libkernels.*")):
        try:
            return Kernels(ctypes.CDLL(str(file)))
        except (OSError, AttributeError):
            continue
    return None
