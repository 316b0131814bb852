"""Reading prompt files. No torch.

One prompt per line: JSON objects in the format of Spec-Bench and EAGLE (`turns`, `question_id`, `category`) or
with a `prompt`, or plain text lines. Blank lines do not count.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fullpipe.errors import UsageError

_BUNDLED = Path(__file__).with_name("prompts.jsonl")
_FORMATS = 'Write {"prompt": "..."} or {"turns": ["..."]}, or plain text.'


@dataclass(frozen=True, slots=True)
class FilePrompt:
    """id: `question_id`, or the line number. category: as given, or the file's stem. turns: what the user says,
    one after another; at least one."""

    id: str
    category: str
    turns: tuple[str, ...]

    @property
    def text(self) -> str:
        """The first turn."""
        return self.turns[0]


def read_prompts(path: Path, limit: int | None = None) -> list[FilePrompt]:
    """The prompts of a file, at most `limit`; their ids differ. The whole file is checked, whatever the limit.

    Raises UsageError for a file that cannot be read and, with its number, for a line that is no prompt or whose
    id another line has.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the number of prompts must be 1 or more (got {limit})")
    text = _read(path)
    prompts: list[FilePrompt] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):  # a JSON string may hold other ends of lines
        if not line.strip():
            continue
        prompt = _parse(path, number, line)
        first = seen.setdefault(prompt.id, number)
        if first != number:
            raise UsageError(f"{path}, line {number}: line {first} has the id {prompt.id} already",
                             hint="Give each line a question_id of its own. A line without one has its number.")
        prompts.append(prompt)
    if not prompts:
        raise UsageError(f"{path} holds no prompts", hint="One prompt per line.")
    return prompts[:limit]


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


def bundled() -> list[FilePrompt]:
    """The prompts that come with Fullpipe, of our own writing, in six categories: code, math, conversation,
    summarisation, translation, qa. Those of conversation have two turns."""
    return read_all([_BUNDLED])


def choose(paths: Sequence[Path] | None, limit: int | None) -> list[FilePrompt]:
    """The prompts of these files, at most `limit` of each, or the bundled ones, at most `limit` of each category."""
    if paths:
        return read_all(paths, limit)
    taken: Counter[str] = Counter()
    chosen = []
    for prompt in bundled():
        taken[prompt.category] += 1
        if limit is None or taken[prompt.category] <= limit:
            chosen.append(prompt)
    return chosen


def _read(path: Path) -> str:
    """The text, without the mark that some editors put before it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        reason = "it holds zero bytes, which no text does" if "\0" in text else ""
    except (OSError, UnicodeDecodeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
    if reason:
        raise UsageError(f"cannot read prompts from {path}: {reason}",
                         hint="Give a text file in UTF-8, one prompt per line, or JSON lines with `turns` or `prompt`.")
    if _is_array(text):
        raise UsageError(f"{path}, line 1: not a prompt: the file is one JSON array",
                         hint=f"Write one object per line, as `jq -c '.[]' {path}` does.")
    return text


def _is_array(text: str) -> bool:
    if not text.lstrip().startswith("["):
        return False
    try:
        return isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def _parse(path: Path, number: int, line: str) -> FilePrompt:
    if not line.lstrip().startswith("{"):
        return FilePrompt(str(number), path.stem, (line,))
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, number, f"it begins like JSON, but {error}") from None
    id, category = value.get("question_id", number), value.get("category", path.stem)
    turns = value.get("turns", [value["prompt"]] if "prompt" in value else None)
    for ok, what in (
        (turns is not None, "it has neither turns nor prompt"),
        (isinstance(turns, list) and turns, "`turns` must be a list of texts, at least one"),
        (isinstance(turns, list) and all(map(_is_text, turns)), "turns and prompts must be texts, and not empty"),
        (type(id) is int or _is_text(id), "`question_id` must be a whole number or a text"),
        (_is_text(category), "`category` must be a text"),
    ):
        if not ok:
            raise _refusal(path, number, what)
    return FilePrompt(str(id), category, tuple(turns))


def _is_text(value: Any) -> bool:
    """Something that a tokenizer can read. JSON can spell halves of characters (surrogates), which none can."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= c <= "\udfff" for c in value)


def _refusal(path: Path, number: int, what: str) -> UsageError:
    return UsageError(f"{path}, line {number}: not a prompt: {what}", hint=_FORMATS)
