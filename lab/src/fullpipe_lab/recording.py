"""Record once, replay many: the target's own tokens, one JSON line per prompt. No torch.

The text is a function of model, prompt, sampling parameters and seed, and of nothing else (DESIGN section 3). So the
target runs once per prompt, and whatever is measured later takes its landings from here.

The first line says whose tokens these are. Each answer is appended whole as soon as there is one, so an interrupted
recording goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fullpipe.errors import UsageError
from fullpipe.request import SamplingParams
from fullpipe_lab.files import Lines, make_folder

FORMAT, VERSION = "fullpipe-recording", 1


@dataclass(frozen=True, slots=True)
class Head:
    """Whose tokens these are. model: as it was named. vocab: number of its real tokens."""

    model: str
    dtype: str
    max_new_tokens: int
    temperature: float
    seed: int
    eos: tuple[int, ...]
    vocab: int

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the target said to one prompt.

    id: "set/question#turn". task: the set's name, or the prompt's category. prompt, tokens: token ids. finish: "stop"
    or "length". margins: how far each pick stood above the second best (None: no rival). asked: `digest` of what the
    user had said ("": not known).
    """

    id: str
    task: str
    prompt: list[int]
    tokens: list[int]
    finish: str
    margins: list[float | None] = field(default_factory=list)
    asked: str = ""


def digest(turns: Sequence[str]) -> str:
    """What the user said, in 16 characters: by it another prompt of the same id is told."""
    return hashlib.sha256(json.dumps(list(turns)).encode()).hexdigest()[:16]


class Recording:
    """A file of answers under one head. `answers` are those that are there already, by id."""

    def __init__(self, lines: Lines, head: Head, answers: Sequence[Answer]) -> None:
        self._lines, self.head = lines, head
        self.answers = {answer.id: answer for answer in answers}

    @property
    def path(self) -> Path:
        return self._lines.path

    @classmethod
    def open(cls, path: Path, head: Head) -> Recording:
        """Begin a recording, or go on with the one that is there. Raises UsageError when the file holds another model's
        or other parameters' answers, and for a file that is no recording."""
        if not path.exists():
            make_folder(path.parent)
            Lines(path).add({"format": FORMAT, "version": VERSION, **asdict(head)})
        found = cls.load(path)
        found.check(head)
        return found

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read a recording. Raises UsageError naming the line that cannot be read."""
        if not path.exists():
            raise UsageError(f"there is no recording {path}", hint="`fullpipe-lab record` makes one.")
        lines = Lines(path)
        first = dict(lines.rows[0]) if lines.rows else {}
        if first.pop("format", None) != FORMAT:
            raise UsageError(f"{path} is not a recording", hint="`fullpipe-lab record` writes them.")
        if (version := first.pop("version", None)) != VERSION:
            raise UsageError(f"{path}: recordings of version {version} cannot be read (this is version {VERSION})",
                             hint="Record again with this version of Fullpipe.")
        try:
            head = Head(**{**first, "eos": tuple(first["eos"])})
        except (TypeError, KeyError) as error:
            raise UsageError(f"{path}, line 1: not the head of a recording ({error})",
                             hint="The file is damaged; record again.") from None
        return cls(lines, head, [_answer(path, number, row) for number, row in enumerate(lines.rows[1:], 2)])

    def check(self, head: Head) -> None:
        """Raises UsageError naming what the recording was made with otherwise."""
        theirs, ours = asdict(self.head), asdict(head)
        for name in ours:
            if theirs[name] != ours[name]:
                raise UsageError(f"{self.path} was recorded with {name} {theirs[name]!r}, not {ours[name]!r}",
                                 hint="Name another file or folder, or the same settings.")

    def add(self, answer: Answer) -> None:
        self._lines.add(asdict(answer))
        self.answers[answer.id] = answer


def _answer(path: Path, number: int, values: dict[str, Any]) -> Answer:
    try:
        return Answer(**values)
    except TypeError as error:
        raise UsageError(f"{path}, line {number}: not an answer ({error})",
                         hint="The file is damaged; delete the line, and record again.") from None
