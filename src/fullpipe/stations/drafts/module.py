"""Speculative Pipeline Decoding (arXiv 2605.30852): a module guesses from hidden states of every depth.

The stages send hidden states here while they compute (`take`). A job is answered with what has arrived: every token as
deep as it is known by now. So drafting never waits for verification, and nothing waits for drafting.

A job may ask about any number of nodes: they and their ancestors in flight are the rows of one forward under the tree
mask (the reference copies caches for every branch instead). Only rows of tokens that are committed and have left the
pipeline are kept; all others deepen and are computed anew each time.

An exit module (PPSD, arXiv 2509.19368) is the same thing with one bound: all its rows are what stage 1 made. It cannot
answer for a node that stage 1 has not finished, so its jobs wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fullpipe.errors import UsageError
from fullpipe.messages import ArenaId, Expansion, Flight, Opening, Part, Tap
from fullpipe.models.dtypes import torch_dtype
from fullpipe.models.memory import free_memory
from fullpipe.models.pool import empty, slots_for
from fullpipe.models.spd_checkpoint import ModuleConfig, check_parity, load_checkpoint
from fullpipe.models.spd_module import PipelineDraftModule, fixture_logits
from fullpipe.models.weights import open_model
from fullpipe.stations.sampling import RowContext, rank
from fullpipe.stations.structure import Place, Structures
from fullpipe.stations.table import Slots, SlotTable

_NOBODY = -2  # no node has this id; -1 is a prompt token
_PARITY = 0.05  # of the greatest logit: what bfloat16 may differ by from the float32 of the fixture
_CHUNK = 256  # completed tokens that become permanent rows in one forward


@dataclass(slots=True)
class _Question:
    """Asks what follows a node. path: slots of it and its ancestors that were not committed when it was asked
    about, its own last."""

    node: int
    position: int
    slot: int
    path: list[int]

    def standing(self) -> Iterator[tuple[int, int]]:
        """Slots of the path, and the positions of what stands there."""
        return zip(self.path, range(self.position + 1 - len(self.path), self.position + 1))


class _Store:
    """Holds the hidden states of every slot, of all requests; slots that nobody uses take no memory.

    features: [slots, taps, hidden], which of them are there in `known`, bool [slots, taps], and whose they are in
    `arena`, `owner` (a node), `flight` (that it came with), `token` and `position`.
    """

    def __init__(self, slots: int, taps: int, hidden: int, dtype: torch.dtype) -> None:
        self.features = empty((slots, taps, hidden), dtype)
        self.known = np.zeros((slots, taps), np.bool_)
        self.arena, self.owner, self.flight = (np.full(slots, _NOBODY, np.int64) for _ in range(3))
        self.token, self.position = (np.zeros(slots, np.int64) for _ in range(2))

    @torch.inference_mode()
    def take(self, flight: int, part: Part, layers: list[int], features: Tensor) -> None:
        """Keep what a tap brings of one part. layers: which taps, as indices; features: [rows, len(layers), hidden].

        Stages have links of their own, so a later stage's taps may come before an earlier one's, and those of a node
        that died after those of the slot's next owner. Flights tell which owner is the newer one; ids of nodes do not,
        for a node may be launched long after it was made."""
        slots, nodes = np.asarray(part.slots, np.int64), np.asarray(part.nodes, np.int64)
        fresh = self.flight[slots] < flight
        new = slots[fresh]
        self.arena[new], self.flight[new], self.owner[new], self.known[new] = part.arena, flight, nodes[fresh], False
        self.token[new], self.position[new] = np.asarray(part.tokens)[fresh], np.asarray(part.positions)[fresh]
        own = np.flatnonzero(self.flight[slots] == flight)
        for column, layer in enumerate(layers):
            self.features[slots[own], layer] = features[torch.from_numpy(own), column].to(self.features.dtype)
            self.known[slots[own], layer] = True


class _Reader:
    """Is one request as the draft station knows it.

    sent: for each slot the node that the engine named last for it.
    past: keys and values of each layer, [room, kv_heads, head_dim] by position, of completed tokens; `kept` of them.
    """

    def __init__(self, opening: Opening, shape: ModuleConfig, slots: Slots, store: _Store) -> None:
        self.arena, self.table, self.store = opening.arena, SlotTable(opening, slots), store
        self.sent: dict[int, int] = {}
        size = (_CHUNK, shape.kv_heads, shape.head_dim)
        dtype = store.features.dtype
        self.past = [(torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)) for _ in range(shape.num_layers)]
        self.kept = 0
        self.waiting: dict[int, _Question] = {}  # asked about, and not answered yet
        self.over = False  # nobody wants answers any more

    def reach(self, position: int) -> None:
        """Have room for keys and values of this position and all before it."""
        room = len(self.past[0][0])
        if position >= room:
            grown = (0, 0, 0, 0, 0, max(position + 1, 2 * room) - room)
            self.past = [(F.pad(keys, grown), F.pad(values, grown)) for keys, values in self.past]

    def apply(self, part: Part) -> None:
        self.table.apply(part)
        self.sent.update(zip(part.slots, part.nodes))
        for row in np.flatnonzero(part.wants).tolist() if not self.over else ():
            node, slot = part.nodes[row], part.slots[row]
            self.waiting[node] = _Question(node, part.positions[row], slot, part.paths[row] or [slot])

    def depth(self, slots: NDArray[np.integer]) -> NDArray[np.int64]:
        """How many taps, from the first on, are known of the tokens that stand in these slots, as the engine says:
        int64 [slots]. A token that the draft channel never carried as a node (-1) is known by what it is and where it
        stands."""
        tokens, positions = self.table.standing(slots)
        store = self.store
        sent = np.array([self.sent.get(slot, _NOBODY) for slot in slots.tolist()], np.int64)
        same = (store.token[slots] == tokens) & (store.position[slots] == positions)
        owned = (store.arena[slots] == self.arena) & ((store.owner[slots] == sent) | ((sent == -1) & same))
        depth: NDArray[np.int64] = np.where(owned, np.logical_and.accumulate(store.known[slots], 1).sum(1), 0)
        return depth

    def completed(self) -> int:
        """How many committed tokens, from the first on, have all their taps here."""
        order = self.table.committed_slots()[self.kept :]
        missing = np.flatnonzero(self.depth(order) < self.store.known.shape[1])
        return self.kept + (int(missing[0]) if len(missing) else len(order))

    def context(self, question: _Question, structures: Structures) -> RowContext:
        table, position = self.table, question.position + 1
        length = position - table.prompt_len
        place = Place(length, max(0, length - len(question.path)), lambda count: self._path(question)[-count:].tolist())
        return RowContext(table.params, position, lambda: self._history(question), place, table.ends,
                          structures.walk(table))

    def _history(self, question: _Question) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        path = self._path(question)
        return path[: self.table.prompt_len], path[self.table.prompt_len :]

    def _path(self, question: _Question) -> NDArray[np.int64]:
        """All tokens up to the one that is asked about."""
        tokens, positions = self.table.standing(np.asarray(question.path))
        return np.concatenate([self.table.committed_tokens()[: positions[0]], tokens])


@dataclass(frozen=True, slots=True)
class _Window:
    """Holds the rows of one forward. slots: int64 [rows], completed tokens that are to be kept first, `fresh` of them.
    mask: bool [rows, kept + rows]. queries: int64 [questions], where they stand."""

    slots: NDArray[np.int64]
    fresh: int
    mask: NDArray[np.bool_]
    queries: NDArray[np.int64]

    @classmethod
    def of(cls, reader: _Reader, completed: int, questions: Sequence[_Question], span: int) -> _Window:
        """Completed tokens up to `completed`, the other committed ones, and the paths of the questions. A row sees no
        further back than the `span` tokens of a training text: beyond that a module guesses next to nothing right
        (notes, field.md section A-bis b)."""
        table, kept = reader.table, reader.kept
        committed = table.committed_slots()[kept:]
        open_paths = [[slot for slot, position in question.standing() if not table.is_committed(slot, position)]
                      for question in questions]
        named = dict.fromkeys([*committed.tolist(), *(slot for path in open_paths for slot in path)])
        slots = np.array(list(named), np.int64)
        row_of = {slot: row for row, slot in enumerate(slots.tolist())}
        _, positions = table.standing(slots)
        mask = positions <= positions[:, None]
        mask[:, len(committed) :] = False
        for path in open_paths:
            rows = np.array([row_of[slot] for slot in path], np.int64)
            mask[rows[:, None], rows] |= np.tri(len(rows), dtype=np.bool_)
        past = np.arange(kept) > positions[:, None] - span
        mask &= positions > positions[:, None] - span
        queries = np.array([row_of[question.slot] for question in questions], np.int64)
        return cls(slots, completed - kept, np.concatenate([past, mask], 1), queries)


class _Arena:
    """Is an arena from the first word of it to the last, in whatever order they come.

    The stages and the draft channel tell of an arena independently, each when it opens and when it closes there, and
    numbers of arenas say nothing about order. So it is known from whatever comes first until the draft channel has
    closed it (which it does for every arena of which the draft is told at all, opened there or not) and so has each
    stage. Nothing comes of it after that.

    reader: from when a job opens it until one closes it. layers: all that are tapped, of each of which some stage
    tells.
    """

    def __init__(self, layers: set[int]) -> None:
        self.reader: _Reader | None = None
        self._layers = layers  # of which the stage has not closed it
        self._wanted = True  # until a stage closes it: then the request has ended
        self._draft_closed = False

    @property
    def over(self) -> bool:
        return self._draft_closed and not self._layers

    def open(self, reader: _Reader) -> None:
        self.reader = reader
        reader.over = not self._wanted  # what jobs may still ask nobody waits for

    def close_layers(self, layers: Sequence[int]) -> None:
        """A stage has closed it: the one that taps these layers."""
        self._layers.difference_update(layers)
        self._wanted = False
        if self.reader:
            self.reader.over = True
            self.reader.waiting.clear()

    def close_draft(self) -> None:
        self._draft_closed, self.reader = True, None


class ModuleDraft:
    """Guesses with a draft module, from the hidden states that the stages have sent.

    module: packed or not; it computes in `dtype`. embedding: the target's, [vocab, hidden], for modules that read
    it. draft_ids: int64 [draft vocab], the target's token of each row of the head; None: all.
    vocab: number of the target's real tokens. structures: what structured texts may say; without them guesses are held
    to no structure.
    """

    def __init__(self, module: PipelineDraftModule, config: ModuleConfig, *, dtype: torch.dtype,
                 embedding: Tensor | None, draft_ids: Tensor | None, vocab: int,
                 structures: Structures | None = None) -> None:
        self._module, self._config = module, config
        self._structures = structures or Structures(strict=False)
        self._embedding, self._draft_ids, self._vocab = embedding, draft_ids, vocab
        self._taps = [bound for bound in config.bounds if bound]
        self._has_embedding = config.bounds[0] == 0
        self.cache_slots = slots_for(len(self._taps) * config.hidden * dtype.itemsize, None, free_memory())
        self._slots, self._store = Slots(), _Store(self.cache_slots, len(self._taps), config.hidden, dtype)
        self._arenas: dict[ArenaId, _Arena] = {}
        self._undrafted: set[tuple[ArenaId, int]] = set()  # open at a stage (its first layer), and no job tells of them
        self._admitted = -1  # job

    # ---- what the pipeline calls -------------------------------------------------------------------------

    def take(self, tap: Tap) -> None:
        """Keep the hidden states of a flight's rows."""
        columns = [column for column, layer in enumerate(tap.layers) if layer in self._taps]
        if not columns:
            return
        stage = tap.layers[columns[0]]
        for opening in tap.flight.opens:
            if opening.drafts:
                self._known(opening.arena)
            else:
                self._undrafted.add((opening.arena, stage))
        self._keep_rows(tap, columns)
        for arena_id in tap.flight.closes:
            if (arena_id, stage) in self._undrafted:
                self._undrafted.remove((arena_id, stage))
            else:  # maybe the first that is heard of it: the draft will be told of its end in any case
                self._known(arena_id).close_layers(tap.layers)
                self._drop_if_over(arena_id)

    def _keep_rows(self, tap: Tap, columns: list[int]) -> None:
        layers = [self._taps.index(tap.layers[column]) for column in columns]
        features, start = torch.as_tensor(tap.features)[:, columns], 0
        for part in tap.flight.parts:
            if part.arena in self._arenas and len(part):
                self._store.take(tap.flight.id, part, layers, features[start : start + len(part)])
            start += len(part)

    def ready(self, job: Flight) -> bool:
        """Whether anything can be answered now, or need not be: nothing is guessed before the prompt is through, and
        by an exit module not before stage 1 is. Where other requests are beyond that, the job does not wait for one
        that is not: its answer comes with theirs."""
        self._admit(job)
        readers = self._open_readers()
        waiting = [(reader, question) for reader in readers for question in reader.waiting.values()]
        idle = any(not reader.waiting and not reader.over for reader in readers)
        others = self._has_embedding and idle
        return not waiting or others or any(self._can_answer(reader, question) for reader, question in waiting)

    def forget(self, nodes: list[int]) -> None:
        """Nobody needs answers about these nodes any more."""
        for reader in self._open_readers():
            for node in nodes:
                reader.waiting.pop(node, None)
        self._store.known[np.isin(self._store.owner, nodes)] = False  # its slot may go to one that says the same

    @torch.inference_mode()
    def run(self, job: Flight) -> list[Expansion]:
        """Answers what can be answered by now, of this job and of earlier ones."""
        self._admit(job)
        expansions = [expansion for reader in self._open_readers() if reader.waiting
                      for expansion in self._answer(reader, job.fanout)]
        for arena_id in job.closes:
            self._known(arena_id).close_draft()
            self._drop_if_over(arena_id)
        return expansions

    # ---- inside ------------------------------------------------------------------------------------------

    def _known(self, arena: ArenaId) -> _Arena:
        """What is known of an arena, which this may be the first to be heard of it."""
        return self._arenas.setdefault(arena, _Arena({*self._taps}))

    def _reader(self, arena: ArenaId) -> _Reader | None:
        known = self._arenas.get(arena)
        return known.reader if known else None

    def _open_readers(self) -> list[_Reader]:
        return [arena.reader for arena in self._arenas.values() if arena.reader]

    def _drop_if_over(self, arena: ArenaId) -> None:
        if self._arenas[arena].over:
            del self._arenas[arena]

    def _admit(self, job: Flight) -> None:
        """Take over what a job says, once."""
        if job.id <= self._admitted:
            return
        self._admitted = job.id
        for opening in job.opens:
            self._open(opening)
        for part in job.parts:
            reader = self._reader(part.arena)
            assert reader, f"job {job.id}: arena {part.arena} is not open"
            reader.apply(part)

    def _open(self, opening: Opening) -> None:
        if opening.path:
            raise UsageError(f"request {opening.request} cannot begin with rows of another: this draft reads hidden "
                             "states of every prompt row, and of shared rows the stages send it none",
                             hint="Compute the prompts of all requests in full with this method: no prefix reuse.")
        self._known(opening.arena).open(_Reader(opening, self._config, self._slots, self._store))

    def _can_answer(self, reader: _Reader, question: _Question) -> bool:
        completed = reader.completed()
        if completed < reader.table.prompt_len - 1:
            return False
        if not self._has_embedding and completed < min(question.position, reader.table.num_committed):
            return False
        return self._has_embedding or bool((reader.depth(np.asarray(question.path)) > 0).all())

    def _answer(self, reader: _Reader, fanout: int) -> list[Expansion]:
        for node in [node for node, asked in reader.waiting.items() if reader.sent.get(asked.slot) != node]:
            del reader.waiting[node]  # its slot has another owner, so it is dead
        questions = [question for question in reader.waiting.values() if self._can_answer(reader, question)]
        if not questions:
            return []
        for question in questions:
            del reader.waiting[question.node]
        # A row that is asked must be in the forward, also if it has been kept.
        first = min(question.position for question in questions)
        reader.kept = min(reader.kept, first)
        completed = min(reader.completed(), first)
        while completed - reader.kept > _CHUNK:
            self._keep(reader, reader.kept + _CHUNK)
        hidden = self._forward(reader, _Window.of(reader, completed, questions, self._config.train_span))
        contexts = [reader.context(question, self._structures) for question in questions]
        tokens, logprobs = rank(self._scores(hidden), contexts, fanout, limit=self._vocab)
        return [Expansion(question.node, guesses, weights, [-1] * len(guesses))
                for question, guesses, weights in zip(questions, tokens, logprobs)]

    def _keep(self, reader: _Reader, end: int) -> None:
        """Make permanent rows of the completed tokens up to position `end`."""
        slots = reader.table.committed_slots()[reader.kept : end].astype(np.int64)
        mask = np.tri(len(slots), reader.kept + len(slots), reader.kept, dtype=np.bool_)
        mask &= ~np.tri(*mask.shape, reader.kept - self._config.train_span, dtype=np.bool_)
        self._forward(reader, _Window(slots, len(slots), mask, np.array([len(slots) - 1])))

    def _forward(self, reader: _Reader, window: _Window) -> Tensor:
        """The window through the module; the keys and values of its completed tokens are kept. Hidden states
        [queries, hidden] before the final norm."""
        tokens, positions = reader.table.standing(window.slots)
        x = self._rows(reader, window.slots, tokens)
        past = [(keys[None, : reader.kept], values[None, : reader.kept]) for keys, values in reader.past]
        mask, queries = torch.from_numpy(window.mask), torch.from_numpy(window.queries)
        masks = [mask] * (self._config.num_layers - 1) + [mask[queries]]
        hidden: Tensor
        hidden, caches = self._module(x[None], torch.from_numpy(positions), masks, queries, past)
        end = reader.kept + window.fresh
        reader.reach(end - 1)
        for (keys, values), (new_keys, new_values) in zip(reader.past, caches):
            keys[reader.kept : end] = new_keys[0, : window.fresh]
            values[reader.kept : end] = new_values[0, : window.fresh]
        reader.kept = end
        return hidden[0]

    def _rows(self, reader: _Reader, slots: NDArray[np.int64], tokens: NDArray[np.int64]) -> Tensor:
        """Each token's row, as deep as it is known: [slots, hidden]."""
        depth, where = reader.depth(slots), torch.from_numpy(slots)
        features = self._store.features[where]
        if self._embedding is not None:
            features = torch.cat((F.embedding(torch.from_numpy(tokens), self._embedding)[:, None], features), 1)
        else:
            depth = np.maximum(depth, 1) - 1
        x = features.new_empty(len(slots), self._config.hidden)
        for kind in np.unique(depth).tolist():
            rows = torch.from_numpy(np.flatnonzero(depth == kind))
            x[rows] = self._module.aggregate(features[rows], kind)
        return x

    def _scores(self, hidden: Tensor) -> Tensor:
        """float32 [rows, vocab]; tokens outside the draft vocabulary are impossible."""
        scores = self._module.logits(hidden)
        if self._draft_ids is None:
            return scores
        whole = scores.new_full((len(scores), self._vocab), -math.inf)
        return whole.index_copy_(1, self._draft_ids, scores)


def build_spd(*, module: str, model: str, dtype: str, vocab: int, parity: bool = True) -> ModuleDraft:
    """Load the draft module in folder `module` for the target at path `model`. What does not fit was refused before
    (`spd_checkpoint.check_fits`).

    parity: compute the checkpoint's fixture, and raise `DamagedModel` if the answer is another one. Off where the
    target's weights are of another quantisation than those that the module was trained with.
    """
    config, tensors, draft_ids = load_checkpoint(Path(module))
    files, kind = open_model(Path(model)), torch_dtype(dtype)
    built = PipelineDraftModule(config, files.config)
    built.load_state_dict({name: value.to(kind if value.ndim > 1 else torch.float32)
                           for name, value in tensors.items()}, assign=True)
    embedding = files.tensor("model.embed_tokens.weight", kind) if config.bounds[0] == 0 or config.shared_head else None
    head = None
    if config.shared_head:
        ids = torch.arange(config.draft_vocab_size) if draft_ids is None else draft_ids
        table = embedding if files.config.tied else files.tensor("lm_head.weight", kind)
        assert table is not None
        head = table[ids]
    built.adopt(files.tensor("model.norm.weight", torch.float32), head)
    built.eval().requires_grad_(False)
    if parity:
        check_parity(Path(module), lambda fixture: fixture_logits(built, fixture), tolerance=_PARITY)
    built.pack()
    return ModuleDraft(built, config, dtype=kind, embedding=embedding if config.bounds[0] == 0 else None,
                     draft_ids=draft_ids, vocab=vocab, structures=Structures(Path(model), vocab, strict=False))
