"""What a receipt's samples say, per combination and task class. No torch.

The metrics mean what DESIGN section 8 says; a speedup is the TBT of the baseline / that of the method. Everything is a
ratio of totals over prompts (all hits over all hits and misses, all time between tokens over all gaps), never a mean of
ratios, so a long answer weighs more than a short one, as it does for who waits for it. Shares of time (fill, bubbles,
the draft's) are weighted by decode time for the same reason.

Only samples of phase "main" are counted. Repeats of a prompt are summed before anything is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fullpipe.errors import UsageError
from fullpipe_lab.receipts import Receipt, Sample

ALL = "all"
"""In place of a task class: every prompt."""

PLAIN = "pp"
_RESAMPLES, _SEED = 2000, 20261121
_TAILS = (2.5, 97.5)  # per cent: what lies between is the 95% interval
_NAMED = 5  # of a list that may be long


class Key(NamedTuple):
    cluster: str
    temperature: float
    method: str
    task: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% confidence interval over prompts; None where one prompt is all there is."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """One method on one cluster at one temperature, over the prompts of one task class.

    tbt_s, ttft_s: seconds of the receipt's clock; TBT is 0 where no answer has two tokens. waste: per emitted token.
    bytes_per_token: of each hop. engine_s_per_step: by the wall clock. compared: samples whose text was compared with
    that of `pp`, and of these same_texts were equal. over_pp: speedup (None where `pp` was not run, or nothing has a
    TBT).
    """

    prompts: int
    tokens: int
    decode_s: float
    tbt_s: float
    ttft_s: float
    steps_per_token: float
    hit_rate: float
    mean_acceptance_length: float
    fill: float
    waste: float
    draft_busy: float
    bytes_per_token: list[float]
    engine_s_per_step: float
    compared: int
    same_texts: int
    near_ties: int
    samples: int
    over_pp: Estimate | None

    @property
    def s_per_token(self) -> float:
        """The first token's way counted, which a TBT does not do."""
        return self.decode_s / self.tokens


Group = dict[tuple[str, int], Sample]
"""The samples of one combination by (prompt, repeat)."""


def main_groups(receipt: Receipt) -> dict[tuple[str, float, str], Group]:
    """Samples of phase "main" by (cluster, temperature, method).

    In the order of `receipt.clusters`, rising temperature, and first appearance of the method. Raises UsageError when
    there are none, when two are of the same prompt and repeat, and when one took no time.
    """
    groups: dict[tuple[str, float, str], Group] = {}
    for sample in receipt.samples:
        if sample.phase != "main":
            continue
        group = groups.setdefault((sample.cluster, sample.temperature, sample.method), {})
        where = f"{sample.method} on {sample.cluster} at temperature {sample.temperature:g}"
        if (sample.prompt, sample.repeat) in group:
            raise UsageError(f"two samples of {sample.prompt}, repeat {sample.repeat}, with {where}",
                             hint="Prompt ids must be unique; were two files of one name given?")
        if not sample.tokens or not sample.decode_s:
            raise UsageError(f"{sample.prompt} with {where}: {sample.tokens} tokens in {sample.decode_s:g} s",
                             hint="Such a sample measures nothing; run the benchmark again for it.")
        group[sample.prompt, sample.repeat] = sample
    if not groups:
        raise UsageError("the receipt holds no samples of phase 'main'",
                         hint="The benchmark was interrupted before its main part; run it again, it goes on there.")
    order = [cluster.name for cluster in receipt.clusters]
    methods = list(dict.fromkeys(method for _, _, method in groups))
    return dict(sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1],
                                                         methods.index(item[0][2]))))


def summarise(receipt: Receipt) -> dict[Key, Summary]:
    """Every combination, for each task class and for `ALL`. Raises UsageError as `main_groups` and `pairs` do."""
    groups = main_groups(receipt)
    found = {}
    for (cluster, temperature, method), group in groups.items():
        tasks = list(dict.fromkeys(sample.task for sample in group.values()))
        for task in [ALL, *(tasks if len(tasks) > 1 else [])]:
            mine = of_task(group, task)
            plain = of_task(groups.get((cluster, temperature, PLAIN), {}), task)
            found[Key(cluster, temperature, method, task)] = _summary(mine, plain)
    return found


class Results:
    """A receipt's groups and summaries, to be looked up. Raises UsageError as `summarise` does."""

    def __init__(self, receipt: Receipt) -> None:
        self.receipt = receipt
        self.groups = main_groups(receipt)
        self.summaries = summarise(receipt)
        self.clock = "virtual time" if receipt.clock == "virtual" else "wall clock"
        self.clusters = [one for one in receipt.clusters if any(one.name == name for name, _, _ in self.groups)]
        self.tasks = [ALL, *dict.fromkeys(key.task for key in self.summaries if key.task != ALL)]

    def temperatures(self, cluster: str) -> list[float]:
        return list(dict.fromkeys(key.temperature for key in self.summaries if key.cluster == cluster))

    def methods(self, cluster: str) -> list[str]:
        return list(dict.fromkeys(key.method for key in self.summaries if key.cluster == cluster))

    def at(self, cluster: str, temperature: float, method: str, task: str = ALL) -> Summary | None:
        return self.summaries.get(Key(cluster, temperature, method, task))


def of_task(group: Group, task: str) -> Group:
    return {key: sample for key, sample in group.items() if task in (ALL, sample.task)}


def _summary(group: Group, plain: Group) -> Summary:
    samples = list(group.values())
    tokens, decode = sum(one.tokens for one in samples), sum(one.decode_s for one in samples)
    hits, misses = sum(one.hits for one in samples), sum(one.misses for one in samples)
    return Summary(
        prompts=len({one.prompt for one in samples}),
        tokens=tokens,
        decode_s=decode,
        tbt_s=_ratio(sum(_between(one) for one in samples), sum(one.tokens - 1 for one in samples)),
        ttft_s=sum(one.ttft_s for one in samples) / len(samples),
        steps_per_token=sum(one.steps for one in samples) / tokens,
        hit_rate=_ratio(hits, hits + misses),
        mean_acceptance_length=1 + hits / max(misses, 1),
        fill=sum(one.fill * one.decode_s for one in samples) / decode,
        waste=sum(one.wasted_rows for one in samples) / tokens,
        draft_busy=sum(one.draft_busy * one.decode_s for one in samples) / decode,
        bytes_per_token=[total / tokens for total in _sums(one.link_bytes for one in samples)],
        engine_s_per_step=_ratio(sum(one.engine_s for one in samples), sum(one.steps for one in samples)),
        compared=sum(one.same_text is not None for one in samples),
        same_texts=sum(one.same_text is True for one in samples),
        near_ties=sum(one.near_ties or 0 for one in samples),
        samples=len(samples),
        over_pp=speedup(plain, group) if plain else None,
    )


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0


def _sums(rows: Iterable[Sequence[float]]) -> list[float]:
    """Column by column. A row may be shorter than others: nothing happened so deep."""
    sums: list[float] = []
    for row in rows:
        sums += [0.0] * (len(row) - len(sums))
        for index, value in enumerate(row):
            sums[index] += value
    return sums


# ---- one method against another --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with the baseline and with the method; repeats summed.

    between_s: seconds from the first token to the last. gaps: between how many tokens.
    """

    baseline_between_s: float = 0.0
    baseline_gaps: int = 0
    between_s: float = 0.0
    gaps: int = 0


def pairs(baseline: Group, group: Group) -> dict[str, Pair]:
    """By prompt. An answer of one token has no TBT: where either's is one, that prompt and repeat is left out.

    Raises UsageError naming the prompts that only one of the two answered.
    """
    if baseline.keys() != group.keys():
        raise _unpaired(baseline, group)
    totals: dict[str, Pair] = {}
    for key, one in group.items():
        other = baseline[key]
        if min(one.tokens, other.tokens) < 2:
            continue
        before = totals.get(one.prompt, Pair())
        totals[one.prompt] = Pair(
            before.baseline_between_s + _between(other), before.baseline_gaps + other.tokens - 1,
            before.between_s + _between(one), before.gaps + one.tokens - 1)
    return totals


def _between(sample: Sample) -> float:
    """Seconds from the first token to the last."""
    return sample.tbt_s * (sample.tokens - 1)


def _unpaired(baseline: Group, group: Group) -> UsageError:
    def names(keys: Iterable[tuple[str, int]]) -> str:
        return listed([f"{prompt} (repeat {repeat})" for prompt, repeat in sorted(keys)])

    one, other = next(iter(group.values())), next(iter(baseline.values()))
    parts = [f"{method} has no sample of {names(keys)}"
             for method, keys in ((one.method, baseline.keys() - group.keys()),
                                  (other.method, group.keys() - baseline.keys())) if keys]
    return UsageError(f"on {one.cluster} at temperature {one.temperature:g} {one.method} and {other.method} did not "
                      f"answer the same prompts: {'; '.join(parts)}",
                      hint="A speedup is of the same prompts. Run the benchmark again; it fills in what is missing.")


def listed(names: Sequence[str]) -> str:
    """A few of them, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def speedup(baseline: Group, group: Group) -> Estimate | None:
    """TBT of the baseline / TBT of the method, on the same prompts. None where one of them has none.

    Where the texts are equal, and so are their lengths, that is the ratio of the total times between tokens. The
    interval is a paired bootstrap over prompts: 2,000 times as many prompts are drawn as there are, each with both its
    times, and the ratio taken anew (percentile method; Efron and Tibshirani 1993, chapter 13). The seed is fixed.
    There is no interval where a draw holds no time at all: tokens that land together have none between them.
    """
    rows = _rows(pairs(baseline, group))
    totals = rows.sum(axis=0)
    if not totals[2]:
        return None
    value = float(_tbt_ratio(totals))
    drawn = rows[np.random.default_rng(_SEED).integers(len(rows), size=(_RESAMPLES, len(rows)))].sum(axis=1)
    if len(rows) < 2 or not drawn[:, 2].all():
        return Estimate(value, None, None)
    low, high = np.percentile(_tbt_ratio(drawn), _TAILS)
    return Estimate(value, float(low), float(high))


def _rows(found: dict[str, Pair]) -> NDArray[np.float64]:
    """[prompts, 4]: seconds and gaps of the baseline, of the method."""
    return np.array([(one.baseline_between_s, one.baseline_gaps, one.between_s, one.gaps) for one in found.values()],
                    dtype=np.float64).reshape(-1, 4)


def _tbt_ratio(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """totals [..., 4], as `_rows` has them."""
    ratio: NDArray[np.float64] = totals[..., 0] / totals[..., 1] / (totals[..., 2] / totals[..., 3])
    return ratio
