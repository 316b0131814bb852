"""The noise, the processors (held against transformers' own), the pick and a draft's ranking.

Chi-square tests draw one token per seed for the seeds 0, 1, 2, ... and are deterministic; their false-alarm
odds are what they would be for a stranger's seeds.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fullpipe.errors import ModelError
from fullpipe.request import SamplingParams
from fullpipe.stations.noise import gumbel, uniforms
from fullpipe.stations.sampling import MOST_TYPICAL, History, RowContext, pick, process, rank, tell_logprobs, typical

VOCAB = 1000
PROMPT, OUTPUT = [5, 7, 7, 900, 3], [7, 11, 11, 11, 42]


def normal(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def said(prompt: list[int], output: list[int]) -> History:
    return lambda: (np.array(prompt, np.int64), np.array(output, np.int64))


def row(params: SamplingParams, position: int = 9) -> RowContext:
    return RowContext(params, position, said(PROMPT, OUTPUT))


def without_noise(scores: Tensor, params: SamplingParams, position: int = 9) -> Tensor:
    """Sampled scores as transformers would give them, save for a constant: relative to the best."""
    clean = scores - gumbel(params.seed, position, scores.shape[1])
    return clean - clean.amax(-1, keepdim=True)


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Of Pearson's chi-square test; tokens expected fewer than 5 times count as one."""
    expected = probs.double() * counts.sum()
    rare = expected < 5
    assert counts[probs == 0].sum() == 0
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(max(len(expected) - 1, 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


class TestNoise:
    def test_known_values(self) -> None:
        """Philox4x64-10 with key (7, 3), and the largest seed at a far position: the same for ever."""
        assert uniforms(7, 0, 3).tolist() == [0.8720734548204873, 0.29536538151378366, 0.4200976785072422]
        expected = [0.31533506512641907, 1.130794644355774, -1.095495581626892, -0.14116239547729492]
        torch.testing.assert_close(gumbel(7, 3, 4), torch.tensor(expected), rtol=2e-7, atol=0)
        expected = [1.6654783487319946, -0.7209568619728088, 0.5387134552001953]
        torch.testing.assert_close(gumbel(2**64 - 1, 2**40, 3), torch.tensor(expected), rtol=2e-7, atol=0)

    def test_prefix_does_not_depend_on_the_vocabulary(self) -> None:
        short = gumbel(1, 2, 100).clone()
        long = gumbel(1, 2, 5000)
        assert torch.equal(long[:100], short)
        assert torch.equal(gumbel(1, 2, 100), short)

    def test_does_not_depend_on_what_was_asked_before(self) -> None:
        first = gumbel(3, 0, 50).clone()
        for position in range(200):  # more than the cache holds
            gumbel(3, position, 50)
        assert torch.equal(gumbel(3, 0, 50), first)

    def test_uniforms_lie_inside_the_unit_interval_at_odd_multiples(self) -> None:
        multiples = uniforms(1, 1, 10_000) * 2.0**53
        assert torch.equal(multiples % 2, torch.ones_like(multiples))
        assert multiples.min() >= 1
        assert multiples.max() <= 2.0**53 - 1

    def test_moments(self) -> None:
        """Mean and variance within 5 standard errors over 10**6 values: false alarm below 2e-6."""
        values = gumbel(11, 0, 10**6).double()
        assert abs(values.mean() - 0.5772156649) < 5 * 1.2825 / 1000
        spread = math.pi**2 / 6
        assert abs(values.var() - spread) < 5 * spread * math.sqrt(4.4) / 1000  # kurtosis 5.4

    @pytest.mark.parametrize("other", [(5, 101), (6, 100), (4, 101), (5 + 2**63, 100), (100, 5)])
    def test_seeds_and_positions_are_independent(self, other: tuple[int, int]) -> None:
        """Correlation over 10**5 values within 5 standard errors: false alarm 6e-7 each."""
        pair = torch.stack([gumbel(5, 100, 10**5), gumbel(*other, 10**5)])
        assert abs(torch.corrcoef(pair)[0, 1]) < 5 / math.sqrt(10**5)


WARPERS = {
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "top_k": ({"temperature": 1.0, "top_k": 40}, [TopKLogitsWarper(40)]),
    "top_k_beyond": ({"temperature": 1.0, "top_k": 5000}, [TopKLogitsWarper(5000)]),
    "top_p": ({"temperature": 1.0, "top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "top_p_tiny": ({"temperature": 1.0, "top_p": 1e-9}, [TopPLogitsWarper(1e-9)]),
    "min_p": ({"temperature": 1.0, "min_p": 0.05}, [MinPLogitsWarper(0.05)]),
    "min_p_one": ({"temperature": 1.0, "min_p": 1.0}, [MinPLogitsWarper(1.0)]),
    "repetition": ({"temperature": 1.0, "repetition_penalty": 1.3},
                   [RepetitionPenaltyLogitsProcessor(1.3)]),
    "bias": ({"temperature": 1.0, "logit_bias": {3: 2.5, 999: -4.0}},
             [SequenceBiasLogitsProcessor([[[3], 2.5], [[999], -4.0]])]),
    "all": ({"temperature": 1.7, "top_k": 300, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2,
             "logit_bias": {7: 3.0}},
            [SequenceBiasLogitsProcessor([[[7], 3.0]]), RepetitionPenaltyLogitsProcessor(1.2),
             TemperatureLogitsWarper(1.7), TopKLogitsWarper(300), TopPLogitsWarper(0.9),
             MinPLogitsWarper(0.01)]),
}


class TestProcess:
    @pytest.mark.parametrize("name", WARPERS)
    def test_equals_transformers(self, name: str) -> None:
        options, theirs = WARPERS[name]
        params = SamplingParams(seed=4, **options)
        logits = normal(1, 6, VOCAB)
        context = torch.tensor([PROMPT + OUTPUT]).expand(6, -1)
        expected = LogitsProcessorList(theirs)(context, logits.clone())
        ours = without_noise(process(logits, [row(params)] * 6), params)
        torch.testing.assert_close(ours, expected - expected.amax(-1, keepdim=True), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("vocab", [600, 20_000])
    def test_top_p_of_a_flat_distribution_looks_at_more_than_the_first_candidates(self, vocab: int) -> None:
        params = SamplingParams(temperature=1.0, top_p=0.97)
        logits = normal(2, 1, vocab, scale=0.3)
        kept = process(logits, [row(params)]) > -math.inf
        assert torch.equal(kept, TopPLogitsWarper(0.97)(None, logits) > -math.inf)
        assert kept.sum() > 512

    def test_frequency_and_presence_count_the_output_only(self) -> None:
        params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
        logits = normal(3, 1, VOCAB)
        expected = logits.clone()
        for token in OUTPUT:
            expected[0, token] -= 0.5
        expected[0, sorted(set(OUTPUT))] -= 0.25
        torch.testing.assert_close(process(logits, [row(params)]), expected)

    def test_penalties_on_an_empty_output(self) -> None:
        context = RowContext(SamplingParams(frequency_penalty=1.0, repetition_penalty=2.0), 1, said([4], []))
        logits = torch.tensor([[0.5, -1.0, 0.0, 2.0, 4.0]])
        assert process(logits, [context]).tolist() == [[0.5, -1.0, 0.0, 2.0, 2.0]]

    def test_leaves_its_input_alone(self) -> None:
        logits = normal(4, 3, VOCAB)
        before = logits.clone()
        params = SamplingParams(temperature=0.5, top_k=5, logit_bias={1: 1.0}, repetition_penalty=1.5)
        process(logits, [row(params)] * 3)
        rank(logits, [row(params)] * 3, 4)
        assert torch.equal(logits, before)

    def test_tokens_of_equal_score_stay_or_go_together(self) -> None:
        logits = torch.tensor([[2.0, 1.0, 3.0, 1.0, 1.0, 0.0]])
        for options in ({"top_k": 3}, {"top_p": 0.93}):
            kept = process(logits, [row(SamplingParams(temperature=1.0, **options))])[0] > -math.inf
            assert kept.tolist() == [True, True, True, True, True, False]

    def test_a_row_does_not_depend_on_its_batch(self) -> None:
        logits = normal(5, 4, VOCAB)
        rows = [row(SamplingParams(temperature=0.9, top_p=0.9, seed=1), 3),
                row(SamplingParams()),
                row(SamplingParams(temperature=2.0, seed=2, repetition_penalty=1.1), 4),
                row(SamplingParams(temperature=0.9, top_p=0.9, seed=1), 5)]
        together = process(logits, rows)
        alone = torch.cat([process(logits[i : i + 1], rows[i : i + 1]) for i in range(4)])
        assert torch.equal(together, alone)

    def test_history_is_read_only_when_needed(self) -> None:
        process(normal(6, 1, 10), [RowContext(SamplingParams(temperature=1.0, top_p=0.5), 0)])
        with pytest.raises(AssertionError, match="history"):
            process(normal(6, 1, 10), [RowContext(SamplingParams(presence_penalty=0.1), 0)])

    def test_ids_outside_a_smaller_vocabulary_are_ignored(self) -> None:
        params = SamplingParams(repetition_penalty=2.0, logit_bias={50: 9.0})
        context = RowContext(params, 2, said([1, 50], [60]))
        assert process(torch.ones(1, 10), [context], limit=8).tolist() == [[1, 0.5, 1, 1, 1, 1, 1, 1]]


class TestPick:
    def test_greedy(self) -> None:
        logits = normal(7, 5, VOCAB)
        tokens, margins = pick(logits, [row(SamplingParams())] * 5, margins=True)
        best = logits.topk(2)
        assert tokens == best.indices[:, 0].tolist()
        assert margins == (best.values[:, 0] - best.values[:, 1]).tolist()
        assert pick(logits, [row(SamplingParams())] * 5) == (tokens, [])

    def test_is_the_argmax_of_process(self) -> None:
        logits = normal(8, 5, VOCAB)
        rows = [row(SamplingParams(temperature=0.1 + t, top_k=20, seed=t), t) for t in range(5)]
        tokens, margins = pick(logits, rows, margins=True)
        best = process(logits, rows).topk(2)
        assert tokens == best.indices[:, 0].tolist()
        assert margins == pytest.approx((best.values[:, 0] - best.values[:, 1]).tolist())

    def test_greedy_rows_among_sampled_ones(self) -> None:
        logits = normal(9, 2, VOCAB)
        tokens, _ = pick(logits, [row(SamplingParams(temperature=1.0)), row(SamplingParams())])
        assert tokens[1] == logits[1].argmax()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_equals_the_lowest_id(self, dtype: torch.dtype) -> None:
        logits = torch.zeros(3, VOCAB, dtype=dtype)
        logits[:, [400, 77, 900]] = 1
        assert pick(logits, [row(SamplingParams())] * 3, margins=True) == ([77] * 3, [0.0] * 3)

    def test_padding_of_the_vocabulary_is_never_picked(self) -> None:
        logits = torch.zeros(1, 20)
        logits[0, 15:] = 50.0
        for temperature in (0.0, 1.0):
            context = [row(SamplingParams(temperature=temperature))]
            assert pick(logits, context, limit=15)[0][0] < 15
            assert max(rank(logits, context, 20, limit=15)[0][0]) < 15

    @pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6])
    def test_a_tiny_temperature_is_greedy(self, temperature: float) -> None:
        logits = normal(10, 4, VOCAB, scale=30)
        context = [row(SamplingParams(temperature=temperature))] * 4
        assert pick(logits, context)[0] == logits.argmax(-1).tolist()
        assert [tokens[0] for tokens in rank(logits, context, 3)[0]] == logits.argmax(-1).tolist()

    def test_no_rival_means_no_margin(self) -> None:
        params = SamplingParams(temperature=1.0, top_k=1)
        assert pick(normal(11, 1, VOCAB), [row(params)], margins=True)[1] == [None]

    @pytest.mark.parametrize("options", [{}, {"temperature": 1.0},
                                         {"temperature": 1.0, "top_k": 3, "top_p": 0.5}])
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_logits_that_are_no_numbers(self, options: dict[str, float], bad: float) -> None:
        logits = normal(12, 2, VOCAB)
        logits[1, 3] = bad
        rows = [row(SamplingParams(**options), 9), row(SamplingParams(**options), 10)]
        with pytest.raises(ModelError, match=f"position 10: the best logit is {bad}"):
            pick(logits, rows)

    def test_everything_forbidden(self) -> None:
        params = SamplingParams(logit_bias={0: -math.inf, 1: -math.inf})
        with pytest.raises(ModelError, match="logit_bias"):
            pick(torch.zeros(1, 2), [row(params)])


class TestRank:
    def test_greedy_is_the_log_softmax(self) -> None:
        logits = normal(13, 3, VOCAB)
        tokens, logprobs = rank(logits, [row(SamplingParams())] * 3, 4)
        best = logits.log_softmax(-1).topk(4)
        assert tokens == best.indices.tolist()
        torch.testing.assert_close(torch.tensor(logprobs), best.values)

    @pytest.mark.parametrize("temperature", [0.3, 1.0, 1.8])
    def test_noise_counts_in_units_of_the_logits(self, temperature: float) -> None:
        logits = normal(14, 1, VOCAB)
        tokens, logprobs = rank(logits, [row(SamplingParams(temperature=temperature, seed=5))], 6)
        best = (logits + temperature * gumbel(5, 9, VOCAB)).log_softmax(-1).topk(6)
        assert tokens == best.indices.tolist()
        torch.testing.assert_close(torch.tensor(logprobs), best.values, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.6},
                                         {"min_p": 0.2, "repetition_penalty": 1.4}])
    def test_a_perfect_draft_puts_the_pick_first(self, options: dict[str, float]) -> None:
        """And of the other candidates, those that pass the filters keep the target's order."""
        logits = normal(15, 20, VOCAB)
        rows = [row(SamplingParams(temperature=0.8, seed=6, **options), position) for position in range(20)]
        tokens, _ = rank(logits, rows, 10)
        assert [first[0] for first in tokens] == pick(logits, rows)[0]
        for ours, weighed in zip(tokens, process(logits, rows)):
            scores = [value for value in weighed[ours].tolist() if value > -math.inf]
            assert scores == sorted(scores, reverse=True)

    def test_what_the_filter_removes_follows_by_its_distance(self) -> None:
        logits = torch.tensor([[5.0, 4.9, 2.0, 0.0, -3.0]])
        tokens, logprobs = rank(logits, [row(SamplingParams(temperature=1.0, top_k=1))], 5)
        assert tokens == [[0, 1, 2, 3, 4]]
        assert sum(math.exp(value) for value in logprobs[0]) == pytest.approx(1)
        assert logprobs[0][2] <= logprobs[0][0] - 3.0 + 1e-5

    def test_impossible_tokens_are_no_candidates(self) -> None:
        params = SamplingParams(temperature=1.0, top_k=2, logit_bias={0: -math.inf})
        tokens, logprobs = rank(torch.zeros(1, 4), [row(params)], 10)
        assert sorted(tokens[0]) == [1, 2, 3]
        assert len(logprobs[0]) == 3
        assert rank(torch.zeros(1, 4), [row(params)], 0) == ([[]], [[]])

    def test_a_close_draft_finds_the_pick_more_often_with_shared_noise(self) -> None:
        """Target = draft + an error of a quarter of a nat: how many of 300 first guesses are true."""
        draft = normal(16, 300, 50, scale=1.0)
        target = draft + normal(17, 300, 50, scale=0.25)
        rows = [row(SamplingParams(temperature=1.0, seed=7), position) for position in range(300)]
        other = [row(SamplingParams(temperature=1.0, seed=8), position) for position in range(300)]
        picks, _ = pick(target, rows)
        shared, apart = (sum(first[0] == token for first, token in zip(rank(draft, guesser, 1)[0], picks))
                         for guesser in (rows, other))
        assert shared > 230
        assert apart < 60


SEEDS = 4000


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.1},
                                     {"temperature": 1.5, "top_k": 10, "top_p": 0.9}])
def test_picks_follow_the_processed_distribution(options: dict[str, float]) -> None:
    """4000 seeds (0 to 3999), one token each from 20, against transformers' filtered and renormalised
    softmax. Chi-square at p = 1e-6, the odds of a false alarm for each of the six."""
    logits = normal(18, 1, 20, scale=1.5)
    options = {"temperature": 1.0, **options}
    warpers = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper,
               "min_p": MinPLogitsWarper}
    expected = LogitsProcessorList(warpers[name](value) for name, value in options.items())(None, logits)
    tokens, _ = pick(logits.expand(SEEDS, -1),
                     [row(SamplingParams(seed=seed, **options), 3) for seed in range(SEEDS)])
    assert p_value(torch.bincount(torch.tensor(tokens), minlength=20), expected[0].softmax(-1)) > 1e-6


def test_successive_tokens_of_a_seed_are_independent() -> None:
    """4000 seeds, the tokens at positions 3 and 4 from the same logits: 25 pairs against the product of
    their probabilities. Chi-square at p = 1e-6."""
    logits = normal(19, 1, 5, scale=0.7)
    first, second = (torch.tensor(pick(logits.expand(SEEDS, -1),
                                       [row(SamplingParams(temperature=1.0, seed=seed), position)
                                        for seed in range(SEEDS)])[0]) for position in (3, 4))
    probs = logits[0].softmax(-1)
    pairs = torch.bincount(first * 5 + second, minlength=25)
    assert p_value(pairs, torch.outer(probs, probs).flatten()) > 1e-6


# ---- what a lossy request lets pass ----------------------------------------------------------------------


def passing(probabilities: list[float], picked: int, epsilon: float, **params: float) -> list[int]:
    logits = torch.tensor([probabilities]).log()
    lossy = SamplingParams(accept_typical=epsilon, **params)  # type: ignore[arg-type]
    return typical(logits, [row(lossy)], [picked])[0]


def test_the_threshold_is_that_of_medusa() -> None:
    """min(e, sqrt(e) exp(-H)): of 0.4, 0.35, 0.15, 0.1 with H = 1.249, sqrt(e) exp(-H) is 0.157 for e = 0.3."""
    some = [0.4, 0.35, 0.15, 0.1]
    assert passing(some, 0, 0.3) == [1]
    assert passing(some, 3, 0.3) == [0, 1], "likeliest first, whatever was picked"
    assert passing(some, 0, 0.25) == [1, 2], "0.143"
    assert passing(some, 0, 0.1) == [1, 2, 3], "0.0907"
    assert passing([0.98, 0.015, 0.005], 0, 0.01) == [1], "e itself is the threshold where the model is sure"


def test_the_surer_the_model_the_less_passes() -> None:
    logits = normal(3, 1, VOCAB)
    numbers = [len(typical(logits / heat, [row(SamplingParams(accept_typical=0.3))], [0], most=VOCAB)[0])
               for heat in (0.1, 0.5, 1.0, 2.0, 4.0)]
    assert numbers == sorted(numbers) and numbers[0] <= 1 < numbers[-1]


def test_nothing_is_said_of_exact_requests() -> None:
    exact, lossy = row(SamplingParams(temperature=1.0)), row(SamplingParams(accept_typical=0.01))
    logits = torch.zeros(2, 6)
    assert typical(logits, [exact, exact], [0, 0]) == []
    assert typical(logits, [exact, lossy], [0, 2]) == [[], [0, 1, 3, 4, 5]]


def test_processors_come_first_and_noise_has_no_say() -> None:
    some = [0.4, 0.35, 0.15, 0.1]
    assert passing(some, 0, 0.01) == [1, 2, 3]
    assert passing(some, 0, 0.01, temperature=1.0, top_k=2) == [1], "what a filter removes does not pass"
    assert passing(some, 0, 0.3, temperature=0.2) == [1], "0.65 and 0.33"
    assert passing(some, 0, 0.3, temperature=0.05) == [], "0.93"
    assert {tuple(passing(some, 0, 0.3, temperature=1.0, seed=seed)) for seed in range(20)} == {(1,)}


def test_padding_never_passes_and_no_more_than_so_many_do() -> None:
    lossy = [row(SamplingParams(accept_typical=0.001))]
    assert typical(torch.zeros(1, 64), lossy, [5], limit=4) == [[0, 1, 2, 3]]
    assert len(typical(torch.zeros(1, 64), lossy, [5])[0]) == MOST_TYPICAL


def test_logits_are_left_as_they_were() -> None:
    logits = normal(4, 2, 50)
    before = logits.clone()
    typical(logits, [row(SamplingParams(accept_typical=0.2, temperature=0.7, repetition_penalty=1.3))] * 2, [0, 0])
    assert torch.equal(logits, before)


# ---- log-probabilities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_told_logprobs_are_those_of_the_raw_logits(dtype: torch.dtype) -> None:
    """Whatever the processors do, and of the real vocabulary only."""
    logits = normal(7, 3, VOCAB + 24).to(dtype)
    params = SamplingParams(temperature=0.3, top_k=5, repetition_penalty=1.5, logit_bias={4: 9.0}, logprobs=4)
    picked = [4, 17, int(logits[2, :VOCAB].argmax())]
    told = tell_logprobs(logits, [row(params)] * 3, picked, limit=VOCAB)
    expected = logits[:, :VOCAB].float().log_softmax(-1)
    values, tokens = expected.sort(descending=True, stable=True)
    for at, (own, *best) in enumerate(told):
        assert own == (picked[at], float(expected[at, picked[at]]))
        assert best == list(zip(tokens[at, :4].tolist(), values[at, :4].tolist()))
    assert told[2][0] == told[2][1], "the picked one is among the likeliest too"


def test_only_rows_that_ask_are_told() -> None:
    logits, quiet, asks = normal(8, 3, 50), row(SamplingParams()), row(SamplingParams(logprobs=0))
    assert tell_logprobs(logits, [quiet] * 3, [0, 1, 2]) == []
    assert [len(told) for told in tell_logprobs(logits, [quiet, asks, quiet], [0, 1, 2])] == [0, 1, 0]
    assert tell_logprobs(logits[:0], [], []) == []


def test_equal_logprobs_go_by_token_and_few_tokens_are_few() -> None:
    asks = [row(SamplingParams(logprobs=3))]
    flat = tell_logprobs(torch.zeros(1, 64), asks, [60])
    assert [token for token, _ in flat[0]] == [60, 0, 1, 2]
    (few,) = tell_logprobs(torch.zeros(1, 64), asks, [1], limit=2)
    assert [token for token, _ in few] == [1, 0, 1]
    assert [value for _, value in few] == pytest.approx([-math.log(2)] * 3)


def test_a_rows_logprobs_do_not_depend_on_its_batch() -> None:
    logits, asks = normal(9, 5, VOCAB), row(SamplingParams(logprobs=20))
    together = tell_logprobs(logits, [asks] * 5, [3] * 5)
    assert together == [tell_logprobs(logits[at : at + 1], [asks], [3])[0] for at in range(5)]
