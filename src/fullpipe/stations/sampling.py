"""Logits become tokens here: processors, shared noise, the pick of a stage and the guesses of a draft.

The pick is `argmax(processed_logits + gumbel(seed, position))`: an exact sample from the softmax of the
processed logits (the Gumbel-max trick), and a pure function of the row. Rows are looked at together, but no
number of one goes into another, and ties go by token id or are kept whole, so a row's answer does not
depend on its batch.

Processors act in the order that `SamplingParams` documents, masks first. What a mask forbids has the score
-inf, for the target's pick and a draft's guesses alike; where nothing would be left, `_edit` says what stays.
The other processors have transformers' formulas, on three points more strictly:

- top-k, top-p and min-p each keep all tokens at or above some score, so one score is computed and one
  comparison made. Tokens of equal score stay or go together; transformers leaves that to its sort in
  top-p. bfloat16 logits tie often, and which of them a sort prefers may change with the batch.
- Sampled scores are shifted so that the best is 0 before the temperature divides them. No probability
  changes, no temperature overflows, and scores that can win stay small enough for float32 to add noise
  to them with an error below 2**-20.
- Filters do nothing at temperature 0: the best token passes all of them.

`process` does this over the whole vocabulary, and is what the others mean. They look at few tokens and say the
same, bit by bit (`stations/candidates.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fullpipe.errors import ModelError
from fullpipe.request import SamplingParams
from fullpipe.stations.bits import Bits, both, has_any, mask
from fullpipe.stations.candidates import Floats, Ids, Sampled, best_of, gap_below, highest_from
from fullpipe.stations.masks import may_follow
from fullpipe.stations.structure import CannotFollow, Follower, Place

History = Callable[[], tuple[Ids, Ids]]
Picked = int | CannotFollow
Lost = dict[int, CannotFollow | None]

MOST_TYPICAL = 8  # tokens besides the pick that a lossy request may let pass at one place
_IMPOSSIBLE = -9999.0  # what OpenAI says in place of minus infinity, for which JSON has no word


def _no_history() -> tuple[Ids, Ids]:
    raise AssertionError("penalties need the row's history")


@dataclass(frozen=True, slots=True)
class RowContext:
    """Holds what the pick of one row depends on, besides its logits.

    position: the position that the picked token will take (the row's own plus one); keys the noise.
    history: gives the prompt's and the output's token ids on this row's path, the row's own token
    included. Called only when `params.needs_history`.
    place, ends, walk: where the path ends, the model's end tokens, and the matcher that follows the request's structure
    (None: it has none, or a draft does not follow it). Read only when `params.restricted`.
    """

    params: SamplingParams
    position: int
    history: History = _no_history
    place: Place | None = None
    ends: Sequence[int] = ()
    walk: Follower | None = None


def process(logits: Tensor, rows: Sequence[RowContext], *, limit: int | None = None) -> Tensor:
    """Processed logits with temperature and noise, -inf where filtered: float32 [rows, vocab].

    logits: float [rows, vocab] in the host's memory, left as it is.
    limit: the real vocabulary. Ids from there on are padding of the head; they are cut off, so the
    result is [rows, min(vocab, limit)].
    Ids of `logit_bias` outside the vocabulary are ignored: the target refuses them at the front door, and
    a draft's head may be padded less than the target's.
    """
    scores, _, sampled, _ = _prepared(logits[:, :limit], rows)
    out = torch.from_numpy(scores).clone()
    for at, floor in sampled.floors().items():
        out[at] = sampled.scores(at, floor) + sampled.noise(at)
    return out


def pick(logits: Tensor, rows: Sequence[RowContext], *, limit: int | None = None,
         margins: bool = False) -> tuple[list[Picked], list[float | None]]:
    """The token that follows each row, of equals the lowest id; or why none can be said, where the row's structure
    cannot be followed any further.

    logits, limit: as in `process`.
    margins: also say by how much each picked token's processed, noisy logit stands above the second best
    (None when it has no rival); else the second list is empty.

    Raises `ModelError` where no token can be picked, as with logits that are NaN.
    """
    known = {} if margins else _best_anyway(logits[:, :limit], rows)
    if not known:
        return _pick(logits, rows, limit, margins)
    left = [at for at in range(len(rows)) if at not in known]
    if left:
        picked, _ = _pick(logits[left], [rows[at] for at in left], limit, margins)
        known.update(zip(left, picked))
    return [known[at] for at in range(len(rows))], []


def _best_anyway(logits: Tensor, rows: Sequence[RowContext]) -> dict[int, Picked]:
    """Rows for which nothing is done but masking, and the best token may follow: they need no masked logits, which take
    several times as long as the search for the best."""
    plain = [at for at, row in enumerate(rows) if row.params.restricted and row.params.temperature == 0
             and not row.params.needs_history and not row.params.logit_bias]
    found: dict[int, Picked] = {}
    for at in plain:
        scores = logits[at].float().numpy()
        token = int(scores.argmax())
        try:
            if np.isfinite(scores[token]) and _may_follow(rows[at], token, len(scores)):
                found[at] = token
        except CannotFollow as error:
            found[at] = error
    return found


def _may_follow(row: RowContext, token: int, vocab: int) -> bool:
    """Whether it certainly may. Raises CannotFollow."""
    known, _, bits = _bits(row, vocab)
    return known and (bits is None or has_any(bits, (token,)))


def _bits(row: RowContext, vocab: int) -> tuple[bool, Bits | None, Bits | None]:
    """Whether the row's path is one that may be; what its structure lets follow, and what may follow by all that is
    asked (None: everything). Raises CannotFollow."""
    assert row.place is not None, "masks need the row's place"
    must = None
    if row.walk is not None and (must := row.walk.may_follow(row.place)) is None:
        return False, None, None
    return True, must, both(must, may_follow(row.params, row.ends, row.place, vocab))


@np.errstate(over="ignore")  # margins may be infinite
def _pick(logits: Tensor, rows: Sequence[RowContext], limit: int | None,
          margins: bool) -> tuple[list[Picked], list[float | None]]:
    scores, tokens, sampled, lost = _prepared(logits[:, :limit], rows)
    gaps = [gap_below(own, token) for own, token in zip(scores, tokens.tolist())] if margins else []
    for at, band in sampled.bands().items():
        best = sampled.best_two(at, band)
        tokens[at] = best.token
        if margins and best.second < best.unseen:  # what comes second was not looked at
            gaps[at] = gap_below(process(logits[at : at + 1], rows[at : at + 1], limit=limit)[0].numpy(), best.token)
        elif margins:
            gaps[at] = float(best.first - best.second)
    picked: list[Picked] = [lost.get(at) or token for at, token in enumerate(tokens.tolist())]
    return picked, [gap if math.isfinite(gap) else None for gap in gaps]


def typical(logits: Tensor, rows: Sequence[RowContext], picked: Sequence[Picked], *,
            limit: int | None = None, most: int = MOST_TYPICAL) -> list[list[int]]:
    """What else a lossy request lets pass: for each row up to `most` tokens, likeliest first, without the picked one;
    none for a row whose request is exact, and an empty list when all are.

    logits, limit: as in `process`. picked: the tokens that `pick` chose.

    A token passes if its probability is above min(e, sqrt(e) exp(-H)), e the request's `accept_typical` and H the
    entropy of the distribution in nats (Medusa's typical acceptance, arXiv 2401.10774, section 2.3.2, its delta set to
    sqrt(e) as there). The distribution has all processors applied and no noise. Greedy decoding has none of its own:
    there it is that of temperature 1.
    """
    passing: list[list[int]] = [[] for _ in rows]
    lossy = [at for at, row in enumerate(rows) if row.params.accept_typical]
    if not lossy:
        return []
    scores, _, sampled, _ = _prepared(logits[lossy, :limit], [rows[at] for at in lossy])
    floors = sampled.floors()
    for index, at in enumerate(lossy):
        own = sampled.scores(index, floors[index]) if index in floors else torch.from_numpy(scores[index])
        likely = _typical(own, rows[at].params.accept_typical, most + 1)
        passing[at] = [token for token in likely if token != picked[at]][:most]
    return passing


def _typical(scores: Tensor, epsilon: float, most: int) -> list[int]:
    probabilities = scores.softmax(0)
    entropy = float(torch.special.entr(probabilities).sum())
    least = np.float32(min(epsilon, math.sqrt(epsilon) * math.exp(-entropy)))
    return highest_from(probabilities.numpy(), np.nextafter(least, np.float32(2)), most)[0]


def tell_logprobs(logits: Tensor, rows: Sequence[RowContext], picked: Sequence[Picked], *,
                  limit: int | None = None) -> list[list[tuple[int, float]]]:
    """For each row whose request asks (`SamplingParams.logprobs`): the picked token and behind it the likeliest ones,
    best first, of equals the lowest id, each with its log-probability. An empty list for the others, and for all rows
    together where none asks.

    logits, limit: as in `process`; probabilities are the softmax of `logits` as they are. picked: what `pick` chose.
    """
    if all(row.params.logprobs is None for row in rows):
        return []
    return [[] if (count := row.params.logprobs) is None or isinstance(token, CannotFollow) else
            _told(given, token, count) for given, row, token in zip(logits[:, :limit], rows, picked, strict=True)]


def _told(given: Tensor, picked: int, count: int) -> list[tuple[int, float]]:
    logprobs = given.float().log_softmax(0).clamp_(min=_IMPOSSIBLE).numpy()
    return [(picked, float(logprobs[picked])), *zip(*best_of(logprobs, count))]


def rank(logits: Tensor, rows: Sequence[RowContext], k: int, *,
         limit: int | None = None) -> tuple[list[list[int]], list[list[float]]]:
    """A draft's k likeliest candidates for what the target picks, best first, of equals the lowest id, and their
    log-probabilities.

    logits, limit: as in `process`, but of the draft. Rows have fewer than k candidates where fewer tokens
    are possible at all, and none where masks leave nothing that the draft knows.

    Target and draft add the same noise g, so once g is known nothing random is left but the draft's own
    error. Let the target's logits be the draft's, d, plus independent errors of Gumbel shape and scale 1.
    Then the target's pick, the argmax of logits + T g, is token i with probability
    softmax(d + T g)_i. At T = 0 that is the draft's softmax, which is what one would have
    said anyway, and the order of candidates is always that of d / T + g. The scale belongs to the logits,
    not to logits / T: over 576 positions, two seeds each, of Qwen2.5-Coder 0.5B guessing 1.5B, the
    surprise at the target's pick is 0.56, 0.57, 0.57 nats at T = 0, 0.5, 1; by the softmax of d / T + g it
    is 0.63 at T = 0.5.

    A token that the draft's top-k, top-p or min-p removes may pass the target's. It stays a candidate,
    ranked below the best that passed, and the less likely the further its score lies below the filter:
    by the same assumption the target lifts it over a distance of x with probability about exp(-x). On the
    same positions, with T = 0.7, top-p 0.8 and top-k 20, the target's pick is among the first 8 in 97.7%
    this way and in 92.7% when the removed tokens are dropped.
    """
    scores, _, sampled, lost = _prepared(logits[:, :limit], rows)
    floors = sampled.floors()
    tokens: list[list[int]] = []
    logprobs: list[list[float]] = []
    for at, own in enumerate(scores):
        if at in lost:
            tokens.append([])
            logprobs.append([])
            continue
        weights = sampled.expected(at, floors[at]) if at in floors else torch.from_numpy(own)
        ids, values = best_of(weights.numpy(), k)
        possible = [value for value in values if value > -math.inf]
        tokens.append(ids[: len(possible)])
        logprobs.append((torch.tensor(possible) - _total(weights, rows[at])).tolist())
    return tokens, logprobs


def _total(weights: Tensor, row: RowContext) -> Tensor | float:
    """The logarithm of the sum of what the weights are logarithms of. Where many are -inf, NumPy is ten times as
    quick."""
    if not row.params.restricted:
        return weights.logsumexp(0)
    best = float(weights.amax())
    return best + math.log(float(np.exp(weights.numpy() - np.float32(best)).sum()))


# ---- what comes before the noise -------------------------------------------------------------------------


def _prepared(logits: Tensor, rows: Sequence[RowContext]) -> tuple[Floats, Ids, Sampled, Lost]:
    """Logits with masks, bias and penalties, [rows, vocab]; their best tokens; how rows with a temperature go on; and
    which rows have lost every token to masks: why, where their structure cannot be followed."""
    given = logits.float()
    edited: Tensor = given
    lost: Lost = {}
    if any(row.params.needs_history or row.params.logit_bias or row.params.restricted for row in rows):
        edited = torch.empty(given.shape, dtype=torch.float32)
        for at, row in enumerate(rows):
            try:
                if not _edit(edited[at], given[at], row):
                    lost[at] = None
            except CannotFollow as error:
                edited[at].copy_(given[at])
                lost[at] = error
    scores = edited.numpy()
    tokens = scores.argmax(1)
    best = scores[np.arange(len(rows)), tokens]
    _check(best, rows)
    return scores, tokens, Sampled(rows, scores, best), lost


def _check(best: Floats, rows: Sequence[RowContext]) -> None:
    """A NaN anywhere in a row is its maximum; a row of which nothing is left has -inf."""
    finite = np.isfinite(best)
    if not finite.all():
        row = int(finite.argmin())
        raise ModelError(
            f"no token can be picked for position {rows[row].position}: the best logit is {float(best[row])}",
            hint="NaN or inf comes from damaged weights or a dtype that overflows: try `dtype=float32`. "
                 "-inf means that logit_bias forbids every token.")


def _edit(scores: Tensor, given: Tensor, row: RowContext) -> bool:
    """Put the logits into scores, with masks, bias and penalties.

    Where they leave nothing the structure alone counts; where that leaves nothing either, or the path is none that the
    structure allows, the scores are the logits and the answer is False. Nobody will commit such a path, but its rows
    may be in flight, and the stage must answer for them. Raises CannotFollow.
    """
    if not row.params.restricted:
        _penalise(scores.copy_(given), row)
        return True
    known, must, bits = _bits(row, len(scores))
    if not known:
        scores.copy_(given)
        return False
    left = _mask(scores, given, bits)
    _penalise(scores, row)
    if left and not (row.params.logit_bias and _is_empty(scores)):
        return True
    if must is not None and _mask(scores, given, must):
        return True
    scores.copy_(given)
    return False


def _mask(scores: Tensor, given: Tensor, bits: Bits | None) -> bool:
    """Put the logits of what may follow; whether anything is. NaN counts: whoever looks for the best token will say
    so."""
    if bits is not None:
        return mask(given.numpy(), bits, scores.numpy())
    return not _is_empty(scores.copy_(given))


def _is_empty(scores: Tensor) -> bool:
    return float(scores.amax()) == -math.inf


def _penalise(scores: Tensor, row: RowContext) -> None:
    """Bias, repetition penalty (prompt and output), frequency and presence penalty (output), in place."""
    params, vocab = row.params, len(scores)
    for token, bias in params.logit_bias.items():
        if 0 <= token < vocab:
            scores[token] += bias
    if not params.needs_history:
        return
    prompt, output = (ids[ids < vocab] for ids in row.history())
    if params.repetition_penalty != 1:
        seen = torch.from_numpy(np.union1d(prompt, output)).to(scores.device)
        before = scores[seen]
        scores[seen] = torch.where(before < 0, before * params.repetition_penalty,
                                   before / params.repetition_penalty)
    said, counts = np.unique(output, return_counts=True)
    penalty = params.frequency_penalty * counts + params.presence_penalty
    scores[torch.from_numpy(said).to(scores.device)] -= torch.from_numpy(penalty).to(scores)
