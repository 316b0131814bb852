"""What llama.cpp takes for single steps: its own C functions, reached inside the xllamacpp package with ctypes.

    in   {"model": ..., "threads": n, "room": slots}
    out  {"version": ..., "load_s": ..., "settings": {...}}
    in   {"tokens": [...], "start": n, "outputs": n}
    out  {"ms": milliseconds, "top": token}

The tokens are a chain at positions start, start + 1, ... of the only sequence; what was cached from start on is
forgotten first. outputs: how many of the last rows get logits. top: the likeliest after the last row. All else is
llama.cpp's default.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import time
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_uint64, c_void_p
from typing import Any

from peer_protocol import Reply, Setup, converse  # type: ignore[import-not-found]


class ModelParams(ctypes.Structure):
    """`llama_model_params`, as long as it may be: it is only passed on."""

    _fields_ = (("all", c_uint64 * 64),)


class ContextParams(ctypes.Structure):
    """`llama_context_params`: the beginning by name, and room for what follows."""

    _fields_ = (*((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq",
                                                "n_outputs_max", "n_outputs_max_per_seq")),
                ("n_threads", c_int32), ("n_threads_batch", c_int32), ("ctx_type", c_int32), ("rest", c_uint64 * 64))


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)),
                ("pos", POINTER(c_int32)), ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))),
                ("logits", POINTER(c_int8)))


_FUNCTIONS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("llama_model_default_params", ModelParams, ()),
    ("llama_context_default_params", ContextParams, ()),
    ("llama_model_load_from_file", c_void_p, (c_char_p, ModelParams)),
    ("llama_init_from_model", c_void_p, (c_void_p, ContextParams)),
    ("llama_get_memory", c_void_p, (c_void_p,)),
    ("llama_memory_seq_rm", c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    ("llama_decode", c_int32, (c_void_p, Batch)),
    ("llama_synchronize", None, (c_void_p,)),
    ("llama_get_logits_ith", POINTER(c_float), (c_void_p, c_int32)),
    ("llama_model_get_vocab", c_void_p, (c_void_p,)),
    ("llama_vocab_n_tokens", c_int32, (c_void_p,)),
    ("llama_print_system_info", c_char_p, ()),
)


def load(setup: Setup) -> tuple[str, Setup, Reply]:
    from xllamacpp import GGML_DEFAULT_N_THREADS, xllamacpp  # type: ignore[import-not-found]

    library = ctypes.CDLL(xllamacpp.__file__)
    for name, result, arguments in _FUNCTIONS:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    params = library.llama_context_default_params()
    if (params.n_seq_max, params.n_threads, params.n_threads_batch) != (1, *[GGML_DEFAULT_N_THREADS] * 2):
        raise RuntimeError("llama_context_params begins otherwise than it did; compare include/llama.h")
    params.n_ctx = params.n_batch = setup["room"]
    params.n_threads = params.n_threads_batch = setup["threads"]
    model = library.llama_model_load_from_file(setup["model"].encode(), library.llama_model_default_params())
    context = library.llama_init_from_model(model, params) if model else None
    if not context:
        raise RuntimeError("llama.cpp could not load it")
    settings = {"weights": "as in the file (quantised)", "kv_cache": "float16", "threads": setup["threads"],
                "n_batch": params.n_batch, "n_ubatch": params.n_ubatch,
                "system": library.llama_print_system_info().decode().strip()}
    vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    return importlib.metadata.version("xllamacpp"), settings, lambda asked: _step(library, context, vocab, **asked)


def _step(library: Any, context: int, vocab: int, tokens: list[int], start: int, outputs: int) -> dict[str, Any]:
    size, one = len(tokens), (c_int32 * 1)(0)
    batch = Batch(
        size, (c_int32 * size)(*tokens), None, (c_int32 * size)(*range(start, start + size)),
        (c_int32 * size)(*[1] * size), (POINTER(c_int32) * size)(*[one] * size),
        (c_int8 * size)(*[row >= size - outputs for row in range(size)]))
    if not library.llama_memory_seq_rm(library.llama_get_memory(context), 0, start, -1):
        raise RuntimeError(f"the cache cannot be cut at {start}")
    begun = time.perf_counter()
    code = library.llama_decode(context, batch)
    library.llama_synchronize(context)
    taken = time.perf_counter() - begun
    logits = library.llama_get_logits_ith(context, size - 1)
    if code or not logits:
        raise RuntimeError(f"llama_decode ended with {code}")
    return {"ms": taken * 1e3, "top": max(range(vocab), key=logits[:vocab].__getitem__)}


if __name__ == "__main__":
    converse(load)
