"""Fullpipe itself, through its public API and on the wall clock, asked exactly as the others are."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from peer_protocol import Answer, Setup, serve  # type: ignore[import-not-found]


def load(setup: Setup) -> tuple[str, Setup, Answer]:
    from fullpipe.threads import share_the_machine

    share_the_machine()  # before torch is loaded
    from fullpipe.llm import LLM
    from fullpipe.request import SamplingParams

    stages, threads = setup["stages"], setup["threads"]
    draft = ",".join(name for name in (setup["draft"], "ngram") if name) if setup["method"] != "pp" else "none"
    llm = LLM(setup["model"], draft=draft, stages=stages, method=setup["method"],
              dtype=setup["dtype"], threads=threads, max_model_len=setup["max_len"])

    def answer(prompt: list[int], max_tokens: int) -> Iterator[list[int]]:
        for chunk in llm.stream(prompt, SamplingParams(max_tokens=max_tokens)):
            yield chunk.token_ids

    return importlib.metadata.version("fullpipe"), {
        "method": setup["method"], "stages": stages, "draft": draft, "dtype": setup["dtype"],
        "threads_per_process": threads}, answer


if __name__ == "__main__":
    serve(load)
