"""What the real draft says of every path that a replay meets, computed once.

A replay asks the draft about nodes; what it answers depends on the node's path alone. Here every path of one
prompt is a node of a trie, its answer kept, and many runs of many methods share them. A row's bits do not
depend on its company (docs/exactness.md), so a kept answer is the answer that the in-process run would get.

Keys and values: the true path (prompt and recorded tokens) is computed in one go and stays; branches share a
pool of slots that is emptied when it is full, and computed again where they are needed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary
from zipfile import BadZipFile

import numpy as np
import torch

from fullpipe.errors import UsageError
from fullpipe.messages import Expansion, Flight, Part
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.dtypes import torch_dtype
from fullpipe.models.paths import step_of_paths
from fullpipe.models.step import Step
from fullpipe.models.weights import open_model
from fullpipe.request import SamplingParams
from fullpipe.stations.drafts.chains import go_on
from fullpipe.stations.sampling import RowContext, rank
from fullpipe_lab.files import on_disk
from fullpipe_lab.recording import Answer, Head

TOP_K = 16
POOL = 768  # slots for branches
_CHUNK = 256  # rows of a step
_SLOTS = 1 << 20  # of all texts; those that none uses take no memory


_taken: WeakKeyDictionary[DecoderSlice, int] = WeakKeyDictionary()


def _slots_of(slice: DecoderSlice, count: int) -> int:
    """The first of so many slots of a slice that no memo has."""
    first = _taken.get(slice, 0)
    if first + count > slice.slots:
        raise UsageError(f"{slice.slots} cache slots are too few for all texts of this recording",
                         hint="Record fewer prompts at a time, or shorter answers.")
    _taken[slice] = first + count
    return first


class Memo:
    """The draft's answers for one prompt and one set of sampling parameters.

    slice: the whole draft model; None: only kept answers can be given. tokens: what the target said. pool: slots
    for branches; at least as many as the longest branch has tokens.
    """

    def __init__(self, slice: DecoderSlice | None, prompt: Sequence[int], tokens: Sequence[int],
                 params: SamplingParams, vocab: int, *, pool: int = POOL) -> None:
        assert not (params.needs_history or params.restricted), "they look at the path; recordings have none"
        self._slice, self._params, self._vocab = slice, params, vocab
        self._prompt, self._truth = list(prompt), list(tokens)
        self._parents, self._tokens, self._positions = [-1], [self._prompt[-1]], [len(self._prompt) - 1]
        self._children: dict[tuple[int, int], int] = {}
        self._answers: list[tuple[list[int], list[float]] | None] = [None]
        self.true = [0]  # ids along the true path, from the last prompt token on
        for token in self._truth:
            self.true.append(self.child(self.true[-1], token))
        self._first: int | None = None  # of the slots in which prompt and true path stand, those of branches behind
        self._pool = max(pool, params.max_tokens + 1)
        self._slots: dict[int, int] = {}  # of branch nodes whose keys and values stand in the pool
        self.computed_rows = 0

    def child(self, parent: int, token: int) -> int:
        """The id of a path by its parent's and its last token."""
        known = self._children.get((parent, token))
        if known is not None:
            return known
        self._children[parent, token] = new = len(self._parents)
        self._parents.append(parent)
        self._tokens.append(token)
        self._positions.append(self._positions[parent] + 1)
        self._answers.append(None)
        return new

    @property
    def prompt_len(self) -> int:
        return len(self._prompt)

    def answers(self, ids: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        """The draft's TOP_K candidates after each path, best first, and their log-probabilities."""
        missing = sorted({id for id in ids if self._answers[id] is None})
        if missing:
            self._compute(missing)
        return [self._answers[id] for id in ids]  # type: ignore[misc]

    # ---- computing ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _compute(self, wanted: list[int]) -> None:
        self._begin()
        wanted = [id for id in wanted if self._answers[id] is None]
        for start in range(0, len(wanted), _CHUNK):
            self._step(wanted[start : start + _CHUNK])

    def _begin(self) -> None:
        """Prompt and true path, once."""
        if self._first is not None:
            return
        assert self._slice is not None, "these answers were kept without this path"
        path = self._prompt + self._truth
        self._first = _slots_of(self._slice, len(path) + self._pool)
        line = np.arange(self._first, self._first + len(path), dtype=np.int32)
        first = len(self._prompt) - 1
        for start in range(0, len(path), _CHUNK):
            end = min(start + _CHUNK, len(path))
            hidden = self._slice.forward(Step.of_text(torch.tensor(path[start:end]), line[:end], start))
            ids = {position: self.true[position - first] for position in range(max(start, first), end)}
            self._keep(list(ids.values()), hidden[[position - start for position in ids]])
        self.computed_rows += len(path)

    def _step(self, wanted: list[int]) -> None:
        """One forward over the wanted paths and those of their ancestors whose keys are not there."""
        rows = self._with_ancestors(wanted)
        if len(rows) > self._pool - len(self._slots):
            self._slots.clear()
            rows = self._with_ancestors(wanted)
        if len(rows) > self._pool:  # long branches: half as many at a time
            half = len(wanted) // 2
            self._step(wanted[:half])
            return self._step(wanted[half:])
        free = sorted(set(range(self._pool)) - set(self._slots.values()))
        self._slots.update(zip(rows, free))
        assert self._slice is not None
        hidden = self._slice.forward(step_of_paths(torch.tensor([self._tokens[id] for id in rows]),
                                                   [self._read(id) for id in rows]))
        index = {id: row for row, id in enumerate(rows)}
        self.computed_rows += len(rows)
        self._keep(wanted, hidden[[index[id] for id in wanted]])
        return None

    def _with_ancestors(self, wanted: Iterable[int]) -> list[int]:
        """Branch nodes to compute, parents first (a parent's id is lower)."""
        found: set[int] = set()
        for id in wanted:
            while id not in found and not self._is_true(id):
                found.add(id)
                id = self._parents[id]
                if id in self._slots:
                    break
        return sorted(found)

    def _is_true(self, id: int) -> bool:
        return id < len(self.true)  # the true path was made first

    def _read(self, id: int) -> list[int]:
        """Slots of a branch node's path, in order of position."""
        assert self._first is not None
        base, branch = self._first + len(self._prompt) + len(self._truth), list[int]()
        while not self._is_true(id):
            branch.append(base + self._slots[id])
            id = self._parents[id]
        return [*range(self._first, self._first + self._positions[id] + 1), *reversed(branch)]

    def _keep(self, ids: list[int], hidden: Any) -> None:
        assert self._slice is not None
        contexts = [RowContext(self._params, self._positions[id] + 1) for id in ids]
        if ids:
            tokens, logprobs = rank(self._slice.logits(hidden), contexts, TOP_K, limit=self._vocab)
            for id, guesses, weights in zip(ids, tokens, logprobs):
                self._answers[id] = guesses, weights

    # ---- keeping -----------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write every path and answer; the old file stays until the new one is whole."""
        known = [id for id, answer in enumerate(self._answers) if answer is not None]
        tokens = np.full((len(known), TOP_K), -1, np.int32)
        logprobs = np.zeros((len(known), TOP_K), np.float64)
        for row, id in enumerate(known):
            guesses, weights = self._answers[id]  # type: ignore[misc]
            tokens[row, : len(guesses)], logprobs[row, : len(guesses)] = guesses, weights
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with on_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                np.savez(file, parents=np.array(self._parents, np.int32), ids=np.array(known, np.int32),
                         last=np.array(self._tokens, np.int32), tokens=tokens, logprobs=logprobs)
            temporary.replace(path)

    def load(self, path: Path) -> None:
        """Take over what `save` kept of the same prompt, tokens and parameters. A damaged file is as good as none:
        what it held is computed again."""
        try:
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                kept = {name: file[name].tolist() for name in ("parents", "last", "ids", "tokens", "logprobs")}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return
        same = {0: 0}
        for id, (parent, token) in enumerate(zip(kept["parents"], kept["last"])):
            if parent >= 0:
                same[id] = self.child(same[parent], token)
        for id, guesses, weights in zip(kept["ids"], kept["tokens"], kept["logprobs"]):
            count = sum(token >= 0 for token in guesses)
            self._answers[same[id]] = guesses[:count], weights[:count]


class MemoDraft:
    """A draft station that answers one request at a time, that of the memo's prompt, from the memo."""

    def __init__(self, memo: Memo) -> None:
        self._memo = memo
        self._ids: dict[int, int] = {}  # slot -> path

    def run(self, job: Flight) -> list[Expansion]:
        return [expansion for part in job.parts for expansion in self.answer(part, job.fanout, job.least)]

    def answer(self, part: Part, fanout: int, least: float = 0.0) -> list[Expansion]:
        """What the draft says of the part's rows that want it."""
        expansions = []
        ids = [self._id(part, row) for row in range(len(part))]
        wanted = [row for row in range(len(part)) if part.wants[row]]
        for row, (tokens, logprobs) in zip(wanted, self._memo.answers([ids[row] for row in wanted])):
            count = min(fanout, len(tokens))
            expansions.append(Expansion(part.nodes[row], tokens[:count], logprobs[:count], [-1] * count))
        if wanted and part.ahead:
            go_on(part, wanted[0], expansions[0], least, partial(self._ask, fanout))
        return expansions

    def _ask(self, fanout: int, one: Part) -> tuple[list[int], list[float]]:
        """What follows the only row of a part."""
        ((tokens, logprobs),) = self._memo.answers([self._id(one, 0)])
        return tokens[:fanout], logprobs[:fanout]

    def _id(self, part: Part, row: int) -> int:
        """The path of a row. Rows of the prompt have none that matters."""
        path, memo = part.paths[row], self._memo
        since = part.positions[row] - (memo.prompt_len - 1)
        if not path:
            return memo.true[max(since, 0)]
        parent = self._ids[path[-2]] if len(path) > 1 else memo.true[since - 1]
        self._ids[path[-1]] = id = memo.child(parent, part.tokens[row])
        return id


class Memos:
    """The memos of a recording's answers, kept in a folder: read when one is needed, written by `save`.

    draft: path of the draft's weights, loaded when the first answer is missing.
    """

    def __init__(self, folder: Path, draft: str, head: Head) -> None:
        self._folder, self._draft, self._head = folder, draft, head
        self._open: dict[str, Memo] = {}
        self._saved: dict[str, int] = {}  # rows computed when a memo was last written
        self._slice: DecoderSlice | None = None

    def of(self, answer: Answer) -> Memo:
        if answer.id not in self._open:
            memo = Memo(self._model(), answer.prompt, answer.tokens, self._head.params, self._head.vocab)
            memo.load(self._path(answer))
            self._open[answer.id] = memo
        return self._open[answer.id]

    def save(self, answer: Answer) -> None:
        """Write what this answer's memo has learned, if anything."""
        memo = self._open.get(answer.id)
        if memo is not None and memo.computed_rows > self._saved.get(answer.id, 0):
            memo.save(self._path(answer))
            self._saved[answer.id] = memo.computed_rows

    def _path(self, answer: Answer) -> Path:
        what = json.dumps([self._draft, asdict(self._head), answer.prompt, answer.tokens])
        return self._folder / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.npz"

    def _model(self) -> DecoderSlice:
        if self._slice is None:
            torch.set_num_threads(1)
            files = open_model(Path(self._draft))
            self._slice = DecoderSlice(files, 0, files.config.num_layers, has_embedding=True, has_head=True,
                                       dtype=torch_dtype(self._head.dtype), slots=_SLOTS)
        return self._slice
