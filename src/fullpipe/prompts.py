"""Reading prompt files. No torch.

One prompt per line: JSON objects in the format of Spec-Bench and EAGLE (`turns`, of which the first is
used, `question_id`, `category`) or with a `prompt`, or plain text lines.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fullpipe.errors import UsageError


@dataclass(frozen=True, slots=True)
class FilePrompt:
    """id: `question_id`, or the line number. category: as given, or the file's stem."""

    id: str
    category: str
    text: str


def read_prompts(path: Path, limit: int | None = None) -> list[FilePrompt]:
    """The prompts of a file, at most `limit`. Raises UsageError naming the line that cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read prompts from {path}: {error}",
                         hint="Give a text file, one prompt per line, or JSON lines with `turns` or `prompt`."
                         ) from error
    prompts = [_parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise UsageError(f"{path} holds no prompts", hint="One prompt per line.")
    return prompts[:limit]


def _parse(path: Path, number: int, line: str) -> FilePrompt:
    if not line.lstrip().startswith("{"):
        return FilePrompt(str(number), path.stem, line)
    try:
        value = json.loads(line)
        text = value["turns"][0] if "turns" in value else value["prompt"]
        assert isinstance(text, str) and text.strip()
    except (ValueError, KeyError, IndexError, TypeError, AssertionError):
        raise UsageError(f"{path}, line {number}: not a prompt",
                         hint='Write {"prompt": "..."} or {"turns": ["..."]}, or plain text.') from None
    return FilePrompt(str(value.get("question_id", number)), str(value.get("category", path.stem)), text)
