"""Training text: files become token sequences that say which of their tokens are learnt.

In plain text every token is learnt; in a conversation what the assistant says, and the token that ends its turn. Those
are found without markers in the template (most have none, and a mask made from markers is then empty without a word:
notes, spd.md section 2.1). The conversation is rendered twice for each answer, once up to where it begins, as for
generation, and once up to its end; what the second has beyond the first is the answer. The pieces are encoded apart, as
they are in generation, where no token reaches from the prompt into the answer.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from fullpipe.errors import MissingExtra, UsageError
from fullpipe.models.tokens.tokenizer import Tokenizer

Message = dict[str, str]
"""One turn: "role" (system, user, assistant or tool) and "content"."""

Overflow = Literal["split", "discard"]

TEXT_ENDINGS = frozenset({".txt", ".md", ".rst", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go",
                          ".java", ".js", ".ts", ".sh", ".html", ".css", ".toml", ".tex"})
ENTRY_ENDINGS = frozenset({".jsonl", ".ndjson", ".parquet"})

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
          "tool": "tool"}
_FORMATS = ('An entry is {"messages": [{"role": ..., "content": ...}, ...]}, {"conversations": [{"from": ..., "value": '
            '...}, ...]} or {"text": ...}.')


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A sequence to train on.

    tokens: int32 [S]. learn: bool [S], token i is a label; the first never is, nothing stands before it. document: what
    it was cut from: pieces of one text have it in common, and so have different answers to one question.
    """

    tokens: NDArray[np.int32]
    learn: NDArray[np.bool_]
    document: str

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(slots=True)
class Report:
    """What became of the documents (files of text, entries of the other files). skipped: number by reason."""

    used: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line: "12 documents used; skipped: 3 (nothing to learn in it), 1 (not UTF-8)"."""
        reasons = ", ".join(f"{number} ({reason})" for reason, number in self.skipped.most_common())
        return f"{self.used} documents used" + (f"; skipped: {reasons}" if reasons else "")


def read_samples(files: Sequence[Path], tokenizer: Tokenizer, *, max_length: int, overflow: Overflow = "split",
                 min_length: int = 10, report: Report | None = None) -> list[Sample]:
    """All samples of the files, in the order of the files and in them; folders are read by name.

    files: plain text; JSON lines, JSON or parquet with `messages`, `conversations` or `text`; folders, in which files
    with the endings above count (a `.json` there is rarely meant: name it).
    max_length: tokens of a sample at most. A file of plain text is cut into pieces so long; an entry of another file
    too, or with overflow "discard" it is left out. min_length: tokens of a sample at least.
    report: told what became of each document.

    Raises UsageError, with file and line, for what cannot be read, and when nothing is left to learn, with the reasons;
    MissingExtra for parquet without pyarrow.
    """
    if not 1 <= min_length <= max_length or max_length < 2:
        raise UsageError(f"samples of {min_length} to {max_length} tokens: there are none",
                         hint="The maximum must be 2 or more, and not below the minimum.")
    told = Report() if report is None else report
    samples: list[Sample] = []
    for document in _documents(files, told):
        found, reason = _cut(document, tokenizer, max_length, overflow, min_length)
        samples += found
        told.used += bool(found)
        told.skipped.update([reason] if not found else [])
    if not samples:
        raise UsageError(f"there is nothing to learn in {', '.join(map(str, files)) or 'no files'}: {told.summary()}",
                         hint=f"{_FORMATS} Conversations need an answer of the assistant.")
    return samples


def fingerprint(files: Sequence[Path], tokenizer: Tokenizer, *, max_length: int, overflow: Overflow = "split",
                min_length: int = 10) -> str:
    """SHA-256 over all that `read_samples` depends on: contents of the files in their order, tokenizer, template,
    settings. Equal: the same samples."""
    template = tokenizer.template.source if tokenizer.template else ""
    told = [tokenizer.fingerprint, template, sorted(tokenizer.eos_ids), max_length, overflow, min_length]
    digest = hashlib.sha256(json.dumps(told).encode())
    for path, _ in _listed(files):
        digest.update(path.suffix.encode())
        digest.update(hashlib.sha256(_bytes(path)).digest())
    return digest.hexdigest()


def split(samples: Sequence[Sample], validation: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on, and about `validation` of them (a share, 0 or more and below 1) held out.

    By document: which ones is a function of seed and texts, not of their order. No text is in both: what is held out
    and stands word for word among the others too (a licence at the head of two files) is left out. A single document
    gives its last pieces. Raises UsageError when nothing can be held out.
    """
    if not 0 <= validation < 1:
        raise UsageError(f"the share held out for validation must be 0 or more and below 1 (got {validation})")
    if validation == 0:
        return list(samples), []
    chosen = _held_out(samples, max(1, round(validation * len(samples))), seed)
    train = [sample for index, sample in enumerate(samples) if index not in chosen]
    known = {sample.tokens.tobytes() for sample in train}
    held = [samples[index] for index in sorted(chosen) if samples[index].tokens.tobytes() not in known]
    if not train or not held:
        raise UsageError(f"{len(samples)} samples are too few to hold some out for validation",
                         hint="Give more text, or shorter samples.")
    return train, held


def _held_out(samples: Sequence[Sample], wanted: int, seed: int) -> set[int]:
    """Indices of the samples to hold out: `wanted`, or some fewer where whole documents do not sum up to it."""
    documents: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        documents.setdefault(sample.document, []).append(index)
    if len(documents) == 1:
        return set(range(len(samples) - wanted, len(samples)))
    chosen: set[int] = set()
    order = sorted(documents, key=lambda name: _digest([seed, name]))
    for name in order:
        if len(chosen) + len(documents[name]) <= wanted:
            chosen.update(documents[name])
    if order and not chosen:
        chosen.update(documents[min(order, key=lambda name: len(documents[name]))])
    return chosen


# ---- from documents to samples ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Document:
    """A text, or the turns of a conversation. complete: its last answer was ended by who gave it. entry: of a file that
    holds many."""

    content: str | list[Message]
    complete: bool = True
    entry: bool = True

    @property
    def name(self) -> str:
        """Of a conversation, that of what comes before the first answer."""
        if isinstance(self.content, str):
            return _digest(self.content)
        first = next((i for i, turn in enumerate(self.content) if _is_answer(self.content, i)), len(self.content))
        return _digest(self.content[:first])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _cut(document: _Document, tokenizer: Tokenizer, max_length: int, overflow: Overflow,
         min_length: int) -> tuple[list[Sample], str]:
    """The samples of a document; when there are none, why."""
    try:
        whole = _encode(document, tokenizer)
    except UsageError as error:
        return [], error.message
    if not any(any(learn) for _, learn in whole):
        return [], "nothing to learn in it"
    if overflow == "discard" and document.entry:
        whole = [(tokens, learn) for tokens, learn in whole if len(tokens) <= max_length]
        if not whole:
            return [], f"longer than {max_length} tokens"
    name, samples = document.name, []
    for tokens, learn in whole:
        for start in range(0, len(tokens), max_length):
            mask = np.array(learn[start : start + max_length], dtype=np.bool_)
            mask[0] = False
            if len(mask) >= min_length and mask.any():
                samples.append(Sample(np.array(tokens[start : start + max_length], dtype=np.int32), mask, name))
    return samples, f"shorter than {min_length} tokens"


Encoded = tuple[list[int], list[bool]]
"""Token ids, and for each whether it is learnt."""


def _encode(document: _Document, tokenizer: Tokenizer) -> list[Encoded]:
    if not isinstance(document.content, str):
        return encode_chat(tokenizer, document.content, complete=document.complete)
    tokens = tokenizer.encode(document.content, add_special=True)
    return [(tokens, [False] + [True] * (len(tokens) - 1))] if tokens else []


def encode_chat(tokenizer: Tokenizer, turns: Sequence[Mapping[str, str]], *, complete: bool = True) -> list[Encoded]:
    """A conversation as the model reads it when it answers, up to the end of the last answer.

    One sequence, unless earlier turns look otherwise once there are later ones: the template changes them (Qwen3 drops
    its thoughts) or, read as one text, they split into other tokens. Then one for each such answer, with what the model
    would see before it. An answer that nobody asked for (some datasets begin with one) is context only.
    complete: False when the last answer was cut off by its length, so that no token ends it.

    Raises UsageError when the model has no template, or it refuses these turns, or does not show an answer.
    """
    if tokenizer.template is None:
        raise UsageError(f"{tokenizer.name} has no chat template", hint="Train it on plain text.")
    found: list[Encoded] = []
    answers = [index for index in range(len(turns)) if _is_answer(turns, index)]
    for index in answers:
        prompt = tokenizer.template.render(turns[:index])
        whole = tokenizer.template.render(turns[: index + 1], generation_prompt=False)
        answer = _answer(prompt, whole, turns[index]["content"], complete or index != answers[-1])
        before = tokenizer.encode(prompt)
        if not (found and before[: len(found[-1][0])] == found[-1][0]):
            found.append(([], []))
        tokens, learn = found[-1]
        learn += [False] * (len(before) - len(tokens))
        tokens += before[len(tokens) :]
        _extend(found[-1], tokenizer, answer)
    return [_without_tail(one) for one in found]


def _is_answer(turns: Sequence[Mapping[str, str]], index: int) -> bool:
    return turns[index]["role"] == "assistant" and any(turn["role"] == "user" for turn in turns[:index])


def _answer(prompt: str, whole: str, content: str, complete: bool) -> str:
    """What the assistant says after `prompt`, the end of its turn included."""
    said = content.strip()  # some templates strip it
    if whole.startswith(prompt):
        answer = whole[len(prompt) :]
    elif said and said in whole:  # the prompt holds more than the turn will show, such as an opened thought
        answer = whole[whole.rfind(said) :]
    else:
        raise UsageError("the chat template does not show the answer", hint="Give the model's own template.")
    if not complete and content in answer:
        answer = answer[: answer.rfind(content) + len(content)]
    return answer


def _extend(sequence: Encoded, tokenizer: Tokenizer, answer: str) -> None:
    """Append an answer. It is learnt up to the last end token in it; after that comes what the template puts between
    turns, which nobody generates. Without an end token all of it is."""
    tokens, learn = sequence
    said = tokenizer.encode(answer)
    ends = [place for place, token in enumerate(said) if token in tokenizer.eos_ids]
    length = ends[-1] + 1 if ends else len(said)
    tokens += said
    learn += [True] * length + [False] * (len(said) - length)


def _without_tail(sequence: Encoded) -> Encoded:
    tokens, learn = sequence
    length = max((place + 1 for place, wanted in enumerate(learn) if wanted), default=0)
    return tokens[:length], learn[:length]


def end_of_answer(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens with which the chat template ends an answer. Without such: all end tokens of the model."""
    if tokenizer.template is not None:
        tokens, learn = encode_chat(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
                                    )[-1]
        if found := tokenizer.eos_ids.intersection(token for token, wanted in zip(tokens, learn) if wanted):
            return frozenset(found)
    return tokenizer.eos_ids


# ---- from files to documents -----------------------------------------------------------------------------------------


def _documents(files: Sequence[Path], report: Report) -> Iterator[_Document]:
    for path, named in _listed(files):
        if path.suffix in ENTRY_ENDINGS or path.suffix == ".json":
            for where, entry in read_entries(path):
                yield _parse(where, entry)
        elif (text := _text(path, named)) is None:
            report.skipped["not UTF-8"] += 1
        else:
            yield _Document(text, entry=False)


def _listed(files: Iterable[Path]) -> Iterator[tuple[Path, bool]]:
    """Every file once; whether it was named itself, or found in a folder."""
    seen: set[Path] = set()
    for path in files:
        named = not path.is_dir()
        for one in [path] if named else _found(path):
            if (real := one.resolve()) not in seen:
                seen.add(real)
                yield one, named


def _found(folder: Path) -> list[Path]:
    """Files of known kinds, by name; hidden ones and what lies in hidden folders do not count."""
    return sorted(path for path in folder.rglob("*")
                  if path.suffix in TEXT_ENDINGS | ENTRY_ENDINGS and path.is_file()
                  and not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}", hint="Name files of text.") from None


def _text(path: Path, named: bool) -> str | None:
    """A file of plain text. None for one that was found in a folder and is not text."""
    data = _bytes(path)
    try:
        if b"\0" not in data:
            return data.decode("utf-8-sig").replace("\r\n", "\n")
        reason = "it holds zero bytes, which no text does"
    except UnicodeDecodeError as error:
        reason = str(error)
    if named:
        raise UsageError(f"{path} is not text: {reason}", hint="Give text in UTF-8.")
    return None


def read_entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, JSON (a list, or one object) or parquet, each with where it stands.

    Raises UsageError, with the line, for what cannot be read; MissingExtra for parquet without pyarrow.
    """
    entries = _rows(path) if path.suffix == ".parquet" else _whole(path) if path.suffix == ".json" else None
    for where, entry in entries or _lines(path):
        if not isinstance(entry, dict):
            raise UsageError(f"{where}: not a JSON object", hint=_FORMATS)
        yield where, entry


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    data = _bytes(path).removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            last = not data.endswith(b"\n") and number == data.count(b"\n") + 1
            raise UsageError(
                f"{path}, line {number}: not JSON: {error}",
                hint="The line is cut off: run what wrote the file again, or delete the line." if last else
                "One JSON object per line; files of plain text end in .txt.") from None


def _whole(path: Path) -> list[tuple[str, Any]] | None:
    """Entries of a file that is one JSON value; None when it is not, and may be lines."""
    try:
        value = json.loads(_bytes(path))
    except (ValueError, RecursionError):
        return None
    return [(f"{path}, entry {number}", one) for number, one in
            enumerate(value if isinstance(value, list) else [value], start=1)]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MissingExtra(f"reading {path} needs pyarrow",
                           hint="pip install 'fullpipe[parquet]', or write JSON lines.") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in ("messages", "conversations", "text") if name in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {name: value for name, value in row.items() if value is not None}
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        raise UsageError(f"cannot read {path}: {error}", hint="Give a whole parquet file.") from None


def _parse(where: str, entry: Mapping[str, Any]) -> _Document:
    turns = turns_of(where, entry)
    if turns is not None:
        return _Document(turns, complete=entry.get("finish_reason") != "length")
    text = entry.get("text")
    if not is_text(text):
        raise UsageError(f"{where}: neither messages nor conversations nor text", hint=_FORMATS)
    return _Document(text)


def turns_of(where: str, entry: Mapping[str, Any]) -> list[Message] | None:
    """The conversation in an entry; None when there is none. Raises UsageError, with `where`, for one that is none."""
    turns = entry.get("messages", entry.get("conversations"))
    if turns is None:
        return None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UsageError(f"{where}: not a conversation: a list of turns is one, at least one", hint=_FORMATS)
    return [_turn(f"{where}, turn {number}", turn) for number, turn in enumerate(turns, start=1)]


def _turn(where: str, turn: Mapping[str, Any]) -> Message:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        raise UsageError(f"{where}: the role {role!r} is none of {', '.join(_ROLES)}", hint=_FORMATS)
    if not is_text(content):
        raise UsageError(f"{where}: its content is not a text", hint=_FORMATS)
    return {"role": _ROLES[role], "content": content}


def is_text(value: Any) -> TypeGuard[str]:
    """A string that a tokenizer can read: JSON can spell halves of characters (surrogates), which none can."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
