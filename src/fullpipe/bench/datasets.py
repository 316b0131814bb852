"""Prompts to measure on: the bundled ones, and any number of files. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from fullpipe.errors import UsageError
from fullpipe.prompts import FilePrompt, read_prompts

_BUNDLED = Path(__file__).with_name("prompts.jsonl")


def bundled() -> list[FilePrompt]:
    """The prompts that come with Fullpipe, of our own writing, in six categories: code, math, conversation,
    summarisation, translation, qa. Those of conversation have two turns."""
    return read_all([_BUNDLED])


def read_all(paths: Iterable[Path], limit: int | None = None) -> list[FilePrompt]:
    """The prompts of several files, at most `limit` of each; ids are "stem/id", such as "gsm8k/12".

    Raises UsageError as `read_prompts` does, and when two files have the same stem.
    """
    sets: dict[str, Path] = {}
    prompts: list[FilePrompt] = []
    for path in paths:
        if path.stem in sets:
            raise UsageError(f"{sets[path.stem]} and {path} have the same name, so their results could not be told "
                             f"apart", hint="Give each file once, and rename one of two that share a name.")
        sets[path.stem] = path
        prompts += [replace(prompt, id=f"{path.stem}/{prompt.id}") for prompt in read_prompts(path, limit)]
    return prompts
