"""Record once, replay many: the target's own tokens, one JSON line per prompt.

The text is a function of model, prompt, sampling parameters and seed, and of nothing else (DESIGN section 3).
So the target runs once per prompt, and whatever is measured later takes its landings from here.

The first line says whose tokens these are. Each answer is appended whole as soon as there is one, so an
interrupted recording goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fullpipe.bench.receipt import write_whole
from fullpipe.errors import CacheError, UsageError

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


@dataclass(frozen=True, slots=True)
class Answer:
    """What the target said to one prompt.

    id: "set/question#turn". task: the set's name, or the prompt's category. prompt, tokens: token ids. finish:
    "stop" or "length". margins: how far each pick stood above the second best (None: no rival). asked: `digest` of
    what the user had said ("": not known).
    """

    id: str
    task: str
    prompt: list[int]
    tokens: list[int]
    finish: str
    margins: list[float | None] = field(default_factory=list)
    asked: str = ""


def digest(turns: Sequence[str]) -> str:
    """By which another prompt of the same id is told."""
    return hashlib.sha256(json.dumps(list(turns)).encode()).hexdigest()[:16]


class Recording:
    """A file of answers under one head. `answers` are those that are there already."""

    def __init__(self, path: Path, head: Head, answers: Sequence[Answer] = ()) -> None:
        self.path, self.head = path, head
        self.answers = {answer.id: answer for answer in answers}

    @classmethod
    def open(cls, path: Path, head: Head) -> Recording:
        """Begin a recording, or go on with the one that is there.

        A last line without its end (a killed run) is cut off. Raises UsageError when the file holds another
        model's or other parameters' answers, and for a file that is no recording.
        """
        if not path.exists():
            make_folder(path.parent)
            write_whole(path, _line({"format": FORMAT, "version": VERSION, **asdict(head)}))
            return cls(path, head)
        found = cls.load(path)
        if found.head != head:
            theirs, ours = asdict(found.head), asdict(head)
            odd = next(name for name in ours if ours[name] != theirs[name])
            raise UsageError(f"{path} was recorded with {odd} {theirs[odd]!r}, not {ours[odd]!r}",
                             hint="Name another file, or the same settings.")
        whole = path.read_bytes()
        if not whole.endswith(b"\n"):
            path.write_bytes(whole[: whole.rfind(b"\n") + 1])
        return found

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read a recording. Raises UsageError naming the line that cannot be read."""
        lines = _lines(path)
        number, first = next(lines, (1, {}))
        if first.pop("format", None) != FORMAT:
            raise UsageError(f"{path} is not a recording", hint="`fullpipe record` writes them.")
        if (version := first.pop("version", None)) != VERSION:
            raise UsageError(f"{path}: recordings of version {version} cannot be read (this is version {VERSION})",
                             hint="Record again with this version of Fullpipe.")
        try:
            head = Head(**{**first, "eos": tuple(first["eos"])})
        except (TypeError, KeyError) as error:
            raise UsageError(f"{path}, line {number}: not the head of a recording ({error})",
                             hint="The file is damaged; record again.") from None
        return cls(path, head, [_answer(path, number, values) for number, values in lines])

    def add(self, answer: Answer) -> None:
        """Append an answer; it is on the disk when this returns."""
        with on_disk(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(asdict(answer)))
        self.answers[answer.id] = answer


def _answer(path: Path, number: int, values: dict[str, Any]) -> Answer:
    try:
        return Answer(**values)
    except TypeError as error:
        raise UsageError(f"{path}, line {number}: not an answer ({error})",
                         hint="The file is damaged; delete the line, and record again.") from None


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """A disk that is full or gone ends the run with the reason; what is in the file stays."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"cannot write {path}: {error.strerror or error}",
                         hint="Make room and run the same command again: it goes on where it stopped.") from error


def make_folder(folder: Path) -> None:
    """Raises UsageError when it is not there and cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror or error}",
                         hint="Name a folder that is writable.") from error


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, allow_nan=False) + "\n"


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recording {path}: {error}",
                         hint="`fullpipe record` writes one.") from error
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            return  # the end of a run that was killed
        try:
            values = json.loads(line)
            assert isinstance(values, dict)
        except (ValueError, AssertionError):
            raise UsageError(f"{path}, line {number}: not a line of a recording",
                             hint="The file is damaged; delete the line, and record again.") from None
        yield number, values
