"""The same questions to whoever runs on the hosts, and what is kept of each answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fullpipe.hub import resolve
from fullpipe.methods import WITH_DEPTH
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.prompts import choose
from fullpipe_lab.hosts.llamacpp_rpc import Rival
from fullpipe_lab.hosts.ours import Running
from fullpipe_lab.hosts.places import Answer, Places, link_bytes
from fullpipe_lab.peers.process import RunnerFailed
from fullpipe_lab.peers.run import Question

AS_IT_COMES = ("pp", "fullpipe")
"""Methods that get no size of ours."""
NOT_COUNTED = "Write a function in Python that tells whether a number is prime. Then write it again with a docstring."
"""The question that warms caches, and on which sizes are tried."""
_SHORT = 8
Sizes = dict[str, tuple[int, ...]]
"""Widths of trees, or depths of those that have one, under "width" and "depth"."""


def questions(model: str, files: Sequence[Path] | None, limit: int) -> tuple[list[Question], list[int]]:
    """The first of each set, through the model's chat template; and the one that is not counted."""
    tokenizer = load_tokenizer(resolve(model))

    def encode(text: str) -> list[int]:
        return tokenizer.chat(text) if tokenizer.template else tokenizer.encode(text, add_special=True)

    return ([Question(one.id, one.category, encode(one.text)) for one in choose(files, limit)], encode(NOT_COUNTED))


def best_size(on: Running, prompt: Sequence[int], method: str, sizes: Sizes, tokens: int) -> int | None:
    """That with the least time between tokens on this prompt; None for a method that runs as it comes."""
    if method in AS_IT_COMES:
        return None

    def taken(size: int) -> float:
        return on.ask(prompt, tokens, method, size).tbt_s or 0.0

    return min(sizes["depth" if method in WITH_DEPTH else "width"], key=taken)


def ask_ours(on: Running, lab: Places, method: str, asked: Sequence[Question], other: Sequence[int], sizes: Sizes,
             tokens: int) -> list[dict[str, Any]]:
    """A row for each question."""
    on.ask(other, _SHORT, method)
    size = best_size(on, other, method, sizes, tokens // 2)
    rows = _rows(lab, asked, lambda prompt: on.ask(prompt, tokens, method, size))
    return [row | {"size": size} for row in rows]


def ask_rival(on: Rival, lab: Places, asked: Sequence[Question], other: Sequence[int],
              tokens: int) -> list[dict[str, Any]]:
    on.ask(other, _SHORT)
    return _rows(lab, asked, lambda prompt: on.ask(prompt, tokens))


def _rows(lab: Places, asked: Sequence[Question], ask: Callable[[Sequence[int]], Answer]) -> list[dict[str, Any]]:
    rows = []
    for question in asked:
        before = link_bytes(lab)
        if not (answer := ask(question.tokens)).tokens:
            raise RunnerFailed(f"said nothing to {question.id}")
        sent = {link: count - before.get(link, 0) for link, count in link_bytes(lab).items()}
        rows.append({"prompt": question.id, "task": question.task, "tokens": answer.tokens,
                     "times": [round(seconds, 5) for seconds in answer.times], "told": answer.told, "link_bytes": sent})
    return rows
