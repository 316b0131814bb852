"""llama.cpp through xllamacpp: its own server in this process, asked over HTTP on the loopback interface.

Its native `/completion` is the way in that takes token ids and gives them back; the bindings' direct call gives text.
It computes in the file's own quantised weights, so it reads a quarter of the bytes that bfloat16 takes. The wheel from
PyPI is built for AVX2, without AVX-512; one that was compiled here has what this processor has (`system` in the
settings says what it found). "speculative": "draft" for a draft model, "ngram" for guesses from the text so far, with
llama.cpp's own settings of both.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import urllib.parse
from collections.abc import Iterator
from typing import Any

from peer_protocol import Answer, Setup, serve  # type: ignore[import-not-found]

_PATIENCE_S = 3600  # who asks has a limit of its own, and is the one to give up


def load(setup: Setup) -> tuple[str, Setup, Answer]:
    import xllamacpp  # type: ignore[import-not-found]

    params = xllamacpp.CommonParams()
    params.model.path = setup["model"]
    params.n_ctx, params.n_parallel = setup["max_len"], 1
    params.verbosity = 0
    settings = {"weights": "as in the file (quantised)", "kv_cache": "float16", "threads": setup["threads"],
                "system": xllamacpp.get_system_info().strip()}
    _set_threads(params, setup["threads"])
    speculative = params.speculative
    if setup["speculative"] == "ngram":
        speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
        settings |= {"speculative": "ngram-simple"}
    elif setup["speculative"] == "draft":
        speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        speculative.draft.mparams.path = setup["draft"]
        _set_threads(speculative.draft, setup["threads"])
        settings |= {"draft_n_max": speculative.draft.n_max, "draft_p_min": speculative.draft.p_min}
    server = xllamacpp.Server(params)
    address = urllib.parse.urlparse(server.listening_address)

    def answer(prompt: list[int], max_tokens: int) -> Iterator[list[int]]:
        assert server  # it ends when nothing refers to it
        # A connection each: the server closes one after a streamed answer.
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_PATIENCE_S)
        with contextlib.closing(connection):
            yield from _ask(connection, prompt, max_tokens)

    return importlib.metadata.version("xllamacpp"), settings, answer


def _set_threads(holder: Any, threads: int) -> None:
    holder.cpuparams.n_threads = threads
    holder.cpuparams_batch.n_threads = threads


def _ask(connection: http.client.HTTPConnection, prompt: list[int], max_tokens: int) -> Iterator[list[int]]:
    question = {"prompt": prompt, "n_predict": max_tokens, "temperature": 0, "stream": True, "return_tokens": True,
                "cache_prompt": False}
    connection.request("POST", "/completion", json.dumps(question), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    if reply.status != http.HTTPStatus.OK:
        raise RuntimeError(f"the server answered {reply.status}: {reply.read().decode(errors='replace')}")
    for line in reply:
        kind, _, value = line.decode().strip().partition(": ")
        if kind == "error":
            raise RuntimeError(f"the server said {value}")
        if kind == "data" and value.startswith("{") and (tokens := json.loads(value)["tokens"]):
            yield tokens


if __name__ == "__main__":
    serve(load)
