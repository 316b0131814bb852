"""Training text in the target's own words: it answers prompts, and each answer becomes a conversation in a file.

The file is its own memory. Line i answers prompt i with the settings that prompt i has, so whoever runs the same
command again goes on after the last whole line, and whoever runs another one is told which line is not his.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fullpipe.errors import CacheError, UsageError
from fullpipe.events import Emitted, Finished
from fullpipe.llm import LLM
from fullpipe.messages import Event
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.prompts import read_prompts
from fullpipe.request import SamplingParams
from fullpipe.training.data import ENTRY_ENDINGS, Message, encode_chat, is_text, read_entries, turns_of

_ROUND = 8  # prompts handed over at once, in multiples of those that run together; each round ends with a thin tail
_ANOTHER = "Name another file, or the same model, prompts and settings as before."

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the answers depend on, beside the prompts. temperatures: prompt i has the i-th, over and over. seed: prompt
    i has seed + i. max_tokens: of an answer."""

    model: str
    dtype: str
    max_tokens: int = 256
    temperatures: tuple[float, ...] = (0.0,)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperatures:
            raise UsageError("no temperature is given", hint="Give one or more; 0 is greedy.")

    def params(self, index: int) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens, seed=self.seed + index,
                              temperature=self.temperatures[index % len(self.temperatures)])

    def told(self, index: int) -> dict[str, Any]:
        """What the line of prompt `index` says of them."""
        params = self.params(index)
        return {"temperature": params.temperature, "seed": params.seed, "model": self.model, "dtype": self.dtype,
                "max_tokens": params.max_tokens}


@dataclass(slots=True)
class Outcome:
    """answers: in the file now. fresh: of them made by this run, fresh_tokens long. altered: of all, those whose text
    does not spell the tokens that were generated (characters cut in half, spelled-out special tokens): to train on them
    is to train on something that the target did not say, if only by a token. too_long: prompts without room for an
    answer, left out."""

    answers: int = 0
    fresh: int = 0
    fresh_tokens: int = 0
    altered: int = 0
    too_long: int = 0


# ---- prompts ---------------------------------------------------------------------------------------------------------


def read_conversations(path: Path, limit: int | None = None) -> list[list[Message]]:
    """What to answer, at most `limit`: messages that end with the user's.

    path: JSON lines with `messages` or `conversations` (the last user turn is answered; answers after it are dropped),
    `prompt`, `text` or `turns` (the first); or text with a prompt a line. Raises UsageError naming file and line.
    """
    if path.suffix in ENTRY_ENDINGS or path.suffix == ".json":
        if limit is not None and limit < 1:
            raise UsageError(f"the number of prompts must be 1 or more (got {limit})")
        asked = [_asked(where, entry) for where, entry in read_entries(path)]
    else:
        asked = [[_user(prompt.text)] for prompt in read_prompts(path, limit)]
    if not asked:
        raise UsageError(f"{path} holds no prompts", hint="One prompt per line.")
    return asked[:limit]


def _asked(where: str, entry: dict[str, Any]) -> list[Message]:
    turns = turns_of(where, entry)
    if turns is None:
        first = entry.get("turns")
        text = entry.get("prompt", entry.get("text", first[0] if isinstance(first, list) and first else None))
        turns = [_user(text)] if is_text(text) else []
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    if not turns or not turns[-1]["content"].strip():
        raise UsageError(f"{where}: no prompt in it",
                         hint='Write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}.')
    return turns


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


# ---- the file --------------------------------------------------------------------------------------------------------


class Answers:
    """The file of answers, line by line in order of the prompts. Use `Answers.open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self.altered = 0

    @classmethod
    def open(cls, path: Path, asked: Sequence[Sequence[Message]], settings: Settings,
             places: Sequence[int]) -> Answers:
        """Begin a file, or go on with the one that is there; a torn last line is cut off.

        asked: all prompts. places: indices of those that get an answer, one a line. Raises UsageError, and changes
        nothing, when a line is not the answer to its prompt with these settings; CacheError when the file cannot be
        written.
        """
        answers = cls(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            for place, line in zip(places, whole.splitlines()):
                answers._take(line, asked[place], settings.told(place))
            with path.open("ab") as file:  # what cannot be written had better be known before the model runs
                if len(whole) < len(data):
                    os.truncate(file.fileno(), len(whole))
        except OSError as error:
            raise _unwritable(path, error) from error
        return answers

    def _take(self, line: bytes, asked: Sequence[Message], wanted: dict[str, Any]) -> None:
        where = f"{self.path}, line {self.number + 1}"
        try:
            values = json.loads(line)
            said = list(values["messages"])
            self.altered += not values["retokenises"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{where}: not a line that `fullpipe train distill` writes",
                             hint="Name another file, or delete this one.") from None
        for name, ours in wanted.items():
            if values.get(name) != ours:
                raise UsageError(f"{where}: made with {name} {values.get(name)!r}, not {ours!r}", hint=_ANOTHER)
        if said[:-1] != list(asked):
            raise UsageError(f"{where}: it answers another prompt than the one in the file of prompts", hint=_ANOTHER)
        self.number += 1

    def add(self, line: dict[str, Any]) -> None:
        """Append a line; it is in the file when this returns. Raises CacheError when it cannot be."""
        try:
            with self.path.open("ab", buffering=0) as file:  # in one write: a kill leaves the line or none, or a tear
                data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
                if file.write(data) < len(data):
                    raise OSError("the disk is full")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.number += 1
        self.altered += not line["retokenises"]


def _unwritable(path: Path, error: OSError) -> CacheError:
    return CacheError(f"cannot write {path}: {error.strerror or error}",
                      hint="Make room, or name a file that can be written; the same command goes on where it stopped.")


# ---- answering -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Listener:
    """Hears of every token and end, and hands answers on in the order of the prompts. What it hands an answer to must
    not raise: an engine drops such a listener."""

    hand_on: Callable[[int, list[int], str], None]
    tokens: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    next: int = 0  # request ids count the prompts, as an LLM is handed them

    def __call__(self, event: Event) -> None:
        if isinstance(event, Emitted):
            self.tokens.setdefault(event.request, []).append(event.token)
        elif isinstance(event, Finished) and event.reason in ("stop", "length"):
            self.reasons[event.request] = event.reason
            while (reason := self.reasons.pop(self.next, None)) is not None:
                self.next += 1
                self.hand_on(self.next - 1, self.tokens.pop(self.next - 1), reason)


class Distiller:
    """Answers what the file does not hold yet.

    listener: give it to the LLM as a listener, and the LLM to nobody else: an answer is written as soon as it and all
    before it have ended, while others are still under way.
    """

    def __init__(self, path: Path, asked: Sequence[list[Message]], settings: Settings, progress: Progress) -> None:
        self._path, self._asked, self._settings, self._progress = path, asked, settings, progress
        self.listener = _Listener(self._hand_on)
        self.outcome = Outcome()
        self._error: Exception | None = None
        self._todo: list[int] = []
        self._began = 0.0

    def run(self, llm: LLM) -> Outcome:
        """Raises UsageError for a file of other answers, CacheError when it cannot be written, and what `LLM.generate`
        raises. What was written stays, and another run goes on after it."""
        self._tokenizer = llm.tokenizer
        places = [place for place, messages in enumerate(self._asked)
                  if len(self._encode(place, messages)) < llm.max_model_len]
        self.outcome.too_long = len(self._asked) - len(places)
        self._answers = Answers.open(self._path, self._asked, self._settings, places)
        self._todo = places[self._answers.number :]
        self._total = len(places)
        self._began = time.monotonic()
        self._count()
        size = _ROUND * (llm.max_num_seqs or 1)
        for start in range(0, len(self._todo), size):
            part = self._todo[start : start + size]
            llm.generate([self._asked[place] for place in part], [self._settings.params(place) for place in part])
            if self._error is not None:
                raise self._error
            assert self.listener.next == start + len(part), "another request ran on this LLM"
        return self.outcome

    def _encode(self, place: int, messages: list[Message]) -> list[int]:
        try:
            return self._tokenizer.chat(messages)
        except UsageError as error:
            raise UsageError(f"prompt {place + 1}: {error.message}", hint=error.hint) from error

    def _hand_on(self, request: int, tokens: list[int], reason: str) -> None:
        if self._error is None:  # after one, no line may follow: the file would have a gap
            try:
                self._write(self._todo[request], tokens, reason)
            except Exception as error:  # the engine would only log it
                self._error = error

    def _write(self, place: int, tokens: list[int], reason: str) -> None:
        ended = tokens[-1] in self._tokenizer.eos_ids  # such a token is no text, whether it is a special one or not
        said = self._tokenizer.decode(tokens[:-1] if ended else tokens)
        messages = [*self._asked[place], {"role": "assistant", "content": said}]
        self._answers.add({"messages": messages, "finish_reason": reason, **self._settings.told(place),
                           "retokenises": retokenises(self._tokenizer, messages, tokens, reason)})
        self.outcome.fresh += 1
        self.outcome.fresh_tokens += len(tokens)
        self._count()

    def _count(self) -> None:
        self.outcome.answers, self.outcome.altered = self._answers.number, self._answers.altered
        rate = self.outcome.fresh_tokens / max(time.monotonic() - self._began, 1e-9)
        self._progress(self._answers.number, self._total, f"{rate:.0f} tokens/s")


def retokenises(tokenizer: Tokenizer, messages: Sequence[Message], tokens: Sequence[int], reason: str) -> bool:
    """Whether training on these messages learns just the tokens that were generated, the end of the turn included."""
    try:
        sequence, learn = encode_chat(tokenizer, messages, complete=reason != "length")[-1]
    except UsageError:  # a template that does not show the answer
        return False
    first = max((place + 1 for place, wanted in enumerate(learn) if not wanted), default=0)  # of the last answer
    return sequence[first:] == list(tokens)
