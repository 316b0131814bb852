"""Stations without a model are shipped for tests, benchmarks and simulation. No torch.

`ScriptedStage` answers from a *truth*, a deterministic next-token function:

- `{"kind": "hash", "vocab": V, "seed": S}`: a hash of the last three tokens on the row's path, in [0, V).
  Every path has its own answer, so a stage that forgets, mixes up or reorders tokens answers wrong.
- `{"kind": "path", "vocab": V, "seed": S}`: a hash of all tokens on the row's path.
- `{"kind": "text", "tokens": [...]}`: a recorded continuation, whatever the path says: the token that
  follows position p is `tokens[p + 1 - prompt_len]`, held at the first and the last token beyond its ends.
- `{"kind": "texts", "texts": [[...], ...]}`: several of them; request r is told the one at r modulo their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullpipe.errors import UsageError
from fullpipe.messages import ArenaId, Expansion, Flight, Landed, Part, Scored
from fullpipe.stations.base import Tapped
from fullpipe.stations.table import SlotTable, Tables

Truth = dict[str, Any]
Answer = Callable[[SlotTable, Part, int], int]

_CONTEXT = 3  # tokens of the path that the hash looks at
_MASK = 2**64 - 1


def hash_token(path: list[int], vocab: int, seed: int, context: int = _CONTEXT) -> int:
    """The token, in [0, vocab), that the hash truth says follows `path`."""
    state = seed & _MASK
    for token in path[-context:]:
        state = ((state ^ token) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & _MASK
        state ^= state >> 29
    return state % vocab


class ScriptedStage:
    """Passes its rows on and, when it is the last, answers from a truth.

    The hidden rows are float32 [rows, 4]: token, position, slot, number of stages passed. Every stage
    checks that row i still describes the flight's row i, so rows dropped from the flight but not from
    the hidden states (or the other way round) fail loudly.

    index, num_stages: which stage this is, from 0, and of how many.
    truth: see the module; read by the last stage only.
    delay_s: what a flight takes, in seconds of sleep.
    fail_at: id of a flight at which `run` raises `RuntimeError`.
    taps: numbers of finished layers to send hidden states of to the draft station; what they say: `tap_features`.

    Raises `UsageError` for a truth of an unknown kind.
    """

    def __init__(self, index: int, num_stages: int, truth: Truth, delay_s: float = 0.0,
                 fail_at: int | None = None, taps: Sequence[int] = ()) -> None:
        self.index, self.num_stages, self.delay_s, self.fail_at = index, num_stages, delay_s, fail_at
        self.taps = list(taps)
        self._answer = answerer(truth)
        self._tables = Tables()

    def run(self, flight: Flight, hidden: NDArray[np.float32] | None) -> NDArray[np.float32] | Landed | Tapped:
        self._tables.open(flight.opens)
        if self.fail_at == flight.id:
            raise RuntimeError(f"scripted failure at flight {flight.id}")
        if self.delay_s:
            time.sleep(self.delay_s)
        for part in flight.parts:
            self._tables[part.arena].apply(part)
        passed = self._pass_on(flight, hidden)
        answer = self._land(flight) if self.index == self.num_stages - 1 else passed
        self._tables.close(flight.closes)
        return Tapped(answer, self.taps, tap_features(flight, self.taps)) if self.taps else answer

    def _pass_on(self, flight: Flight, hidden: NDArray[np.float32] | None) -> NDArray[np.float32]:
        rows = [[token, position, slot, self.index] for part in flight.parts
                for token, position, slot in zip(part.tokens, part.positions, part.slots)]
        expected = np.array(rows, dtype=np.float32).reshape(len(rows), 4)
        if (hidden is None) != (self.index == 0) or (hidden is not None
                                                     and not np.array_equal(hidden, expected)):
            raise AssertionError(f"stage {self.index}, flight {flight.id}: got {hidden}, not {expected}")
        expected[:, 3] += 1
        return expected

    def _land(self, flight: Flight) -> Landed:
        landed = Landed(0.0, flight.id)
        for part in flight.parts:
            table = self._tables[part.arena]
            for row in (row for row in range(len(part)) if part.wants[row]):
                landed.nodes.append(part.nodes[row])
                landed.tokens.append(self._answer(table, part, row))
            landed.prompts += self._scores(table, part) if table.scored else []
        return landed

    def _scores(self, table: SlotTable, part: Part) -> list[Scored]:
        return [scripted_score(part.arena, following, table.scored[following], self._answer(table, part, row),
                               table.params.prompt_logprobs or 0)
                for row, position in enumerate(part.positions) if (following := position + 1) < table.prompt_len]


def scripted_score(arena: ArenaId, position: int, token: int, likeliest: int, count: int) -> Scored:
    """What scripted stages say of a prompt's token: the further it is from the one that the truth says, the less likely
    it was; of those above that the nearest come first."""
    told = [(token, -0.5 - abs(token - likeliest)), *((likeliest + k, -0.5 - k) for k in range(count))]
    return Scored(arena, position, 1 + abs(token - likeliest), told)


def tap_features(flight: Flight, layers: Sequence[int]) -> NDArray[np.float32]:
    """What scripted stages tap: [rows, len(layers), 4], request, node, position and number of layers of each."""
    said = [[[part.arena, node, position, layer] for layer in layers] for part in flight.parts
            for node, position in zip(part.nodes, part.positions)]
    return np.array(said, dtype=np.float32).reshape(len(said), len(layers), 4)


class EchoDraft:
    """Guesses `token + 1, token + 2, ...` for each wanted row, equally likely.

    It has no opinion worth having: it shows that jobs go out and answers come back.

    delay_s: what each row of a job takes, in seconds of sleep.
    fail_at: id of a job at which `run` raises `RuntimeError`.
    """

    def __init__(self, delay_s: float = 0.0, fail_at: int | None = None) -> None:
        self.delay_s, self.fail_at = delay_s, fail_at

    def run(self, job: Flight) -> list[Expansion]:
        if self.fail_at == job.id:
            raise RuntimeError(f"scripted failure at job {job.id}")
        if self.delay_s:
            time.sleep(self.delay_s * job.num_rows)
        return [_echo(part.nodes[row], part.tokens[row], job.fanout) for part in job.parts
                for row in range(len(part)) if part.wants[row]]


def _echo(node: int, token: int, count: int) -> Expansion:
    return Expansion(node, [token + 1 + i for i in range(count)], [-float(np.log(count))] * count,
                     [-1] * count)


def answerer(truth: Truth) -> Answer:
    match truth:
        case {"kind": "hash", "vocab": int(vocab), "seed": int(seed)}:
            return lambda table, part, row: hash_token(table.tail(part, row, _CONTEXT), vocab, seed)
        case {"kind": "path", "vocab": int(vocab), "seed": int(seed)}:
            return lambda table, part, row: hash_token(path := table.path(part, row), vocab, seed, len(path))
        case {"kind": "text", "tokens": [_, *_] as tokens}:
            return lambda table, part, row: _recorded(tokens, table, part, row)
        case {"kind": "texts", "texts": [_, *_] as texts} if all(texts):
            return lambda table, part, row: _recorded(texts[table.request % len(texts)], table, part, row)
    raise UsageError(f"no such truth: {truth!r}",
                     hint='Known are {"kind": "hash", "vocab": V, "seed": S}, {"kind": "path", "vocab": V, "seed": S}, '
                          '{"kind": "text", "tokens": [...]} and {"kind": "texts", "texts": [[...], ...]}, with at '
                          'least one token in each text.')


def _recorded(tokens: list[int], table: SlotTable, part: Part, row: int) -> int:
    return int(tokens[min(max(part.positions[row] + 1 - table.prompt_len, 0), len(tokens) - 1)])
