"""The draft vocabulary: the tokens that a module may propose, those that the training text says most.

A head over fewer tokens is a smaller and faster one; what it cannot say is a miss. `Vocab.mass` is how much of the
training text it can say.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullpipe.errors import DraftMismatch, UsageError
from fullpipe.files import write_whole
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.training.data import Sample, end_of_answer

_REBUILD = "Build one for this model with `fullpipe train vocab`."


@dataclass(frozen=True, slots=True, eq=False)
class Vocab:
    """ids: int64 [size], rising; the target's id of each draft id. mass: share of the counted labels that are among
    them. total: labels counted (0, with a mass of 0: not known)."""

    ids: NDArray[np.int64]
    mass: float = 0.0
    total: int = 0

    def __len__(self) -> int:
        return len(self.ids)


def count_labels(samples: Iterable[Sample], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """How often each token is learnt: int64 [largest id + 1]. Raises UsageError when none is."""
    counts = np.zeros(max(tokenizer.tokens) + 1, dtype=np.int64)
    for sample in samples:
        counts += np.bincount(sample.tokens[sample.learn], minlength=len(counts))
    if not counts.any():
        raise UsageError("the training text has no labels, so nothing can be counted",
                         hint="Conversations need an answer of the assistant.")
    return counts


def must_have(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that every draft vocabulary has, however rare: end tokens, and special ones that the template spells."""
    template = tokenizer.template.source if tokenizer.template else ""
    added = tokenizer.backend.get_added_tokens_decoder()
    return tokenizer.eos_ids | {id for id, token in added.items() if token.special and token.content in template}


def build_vocab(samples: Iterable[Sample], size: int, *, tokenizer: Tokenizer,
                always: Iterable[int] | None = None) -> Vocab:
    """The `size` tokens that are learnt most often, `always` among them (None: `must_have`).

    Raises UsageError for a size that is too small for these or larger than the vocabulary, and without labels.
    """
    return pick(count_labels(samples, tokenizer), size, tokenizer=tokenizer, always=always)


def pick(counts: NDArray[np.int64], size: int, *, tokenizer: Tokenizer, always: Iterable[int] | None = None) -> Vocab:
    """`build_vocab` from counts. Of tokens counted equally often the lower id goes first: a BPE learns frequent tokens
    first, so that is a guess at those that did not occur."""
    needed = np.array(sorted(must_have(tokenizer) if always is None else set(always)), dtype=np.int64)
    known = np.array(sorted(tokenizer.tokens), dtype=np.int64)  # ids between them are padding
    if not max(1, len(needed)) <= size <= len(known):
        raise UsageError(f"a draft vocabulary of {size} tokens cannot be: {len(needed)} are always in it, and "
                         f"{tokenizer.name} has {len(known)}", hint="Usual sizes are 4096 to 32768.")
    others = np.setdiff1d(known, needed)
    best = others[np.argsort(-counts[others], kind="stable")[: size - len(needed)]]
    ids = np.sort(np.concatenate([needed, best]))
    total = int(counts.sum())
    return Vocab(ids, float(counts[ids].sum() / total), total)


def save_vocab(vocab: Vocab, path: Path, *, tokenizer: Tokenizer, model: str, files: Sequence[Path]) -> None:
    """Write it as JSON in one move. model: as the user names it. Raises UsageError when it cannot be written."""
    values = {"model": model, "tokenizer_hash": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
              "draft_vocab_size": len(vocab), "mass": vocab.mass, "total": vocab.total,
              "files": [str(file) for file in files], "token_ids": vocab.ids.tolist()}
    write_whole(path, json.dumps(values) + "\n")


def load_vocab(path: Path, *, tokenizer: Tokenizer) -> Vocab:
    """Read a file of `save_vocab`, or of the SPD reference (notes, spd.md section 8).

    Raises UsageError for a file that is none, DraftMismatch for a vocabulary of another tokenizer: ids that it does not
    have, or without the token that ends an answer, without which a module runs past every end.
    """
    values = _read(path)
    ids = values.get("token_ids")
    if not isinstance(ids, list) or not ids or not all(type(id) is int for id in ids):
        raise UsageError(f"{path} is no draft vocabulary: it has no list `token_ids` of whole numbers", hint=_REBUILD)
    if values.get("draft_vocab_size", len(ids)) != len(ids):
        raise UsageError(f"{path} says that it holds {values['draft_vocab_size']} tokens, but it holds {len(ids)}",
                         hint=_REBUILD)
    (most, number), = Counter(ids).most_common(1)
    if number > 1:
        raise UsageError(f"{path} holds token {most} {number} times", hint=_REBUILD)
    _check_fits(path, values, frozenset(ids), tokenizer)
    return Vocab(np.array(sorted(ids), dtype=np.int64), _number(values, "mass", "topk_mass_ratio"),
                 int(_number(values, "total", "total_positions_counted")))


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
        reason = "not a JSON object"
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    raise UsageError(f"cannot read the draft vocabulary {path}: {reason}", hint=_REBUILD)


def _check_fits(path: Path, values: dict[str, Any], ids: frozenset[int], tokenizer: Tokenizer) -> None:
    if values.get("tokenizer_hash", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise DraftMismatch(f"{path} was built for {values.get('model', 'another model')}, whose tokenizer is not that "
                            f"of {tokenizer.name}", hint=_REBUILD)
    if strange := sorted(ids - tokenizer.tokens.keys()):
        raise DraftMismatch(f"{path} holds token {strange[0]}, which {tokenizer.name} does not have", hint=_REBUILD)
    if missing := sorted(end_of_answer(tokenizer) - ids):
        raise DraftMismatch(f"{path} lacks {tokenizer.tokens[missing[0]]!r} (token {missing[0]}), with which "
                            f"{tokenizer.name} ends its answers", hint=_REBUILD)


def _number(values: dict[str, Any], *names: str) -> float:
    found = next((values[name] for name in names if name in values), 0.0)
    return found if isinstance(found, (int, float)) else 0.0
