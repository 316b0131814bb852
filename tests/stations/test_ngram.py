"""Prompt lookup: the index against a plain search, the rates' arithmetic, the source's trees."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time

import pytest

from fullpipe.errors import UsageError
from fullpipe.messages import Expansion, Flight, Opening, Part
from fullpipe.request import SamplingParams
from fullpipe.stations.drafts.ngram import Match, NgramDraft, NgramIndex, Rates, build_ngram


def index_of(text: list[int], **sizes: int) -> NgramIndex:
    index = NgramIndex(**sizes)
    index.extend(text)
    return index


def plain_search(text: list[int], path: list[int], *, min_n: int, max_n: int, count: int,
                 most: int) -> list[Match]:
    """What `lookup` promises, by reading the whole text anew."""
    found: dict[tuple[int, ...], int] = {}
    for n in range(min(max_n, len(path)), min_n - 1, -1):
        ends = [end for end in range(min(len(text), len(path) - 1), n - 1, -1)
                if text[end - n : end] == path[-n:]]
        for end in ends[:16]:
            grown = list(path)
            for at in range(end, end + count):
                grown.append(grown[at])
            if len(found) < most:
                found.setdefault(tuple(grown[len(path):]), n)
    return [Match(tokens, n) for tokens, n in found.items()]


class TestIndex:
    def test_longest_match_first_then_the_newest(self) -> None:
        text = [1, 2, 3, 10, 9, 2, 3, 11, 9, 2, 3, 12, 1, 2, 3]
        matches = index_of(text, max_n=3).lookup([1, 2, 3], max_continuation=1, max_matches=4)
        assert matches == [Match((10,), 3), Match((12,), 2), Match((11,), 2)]

    def test_a_path_ahead_of_the_text(self) -> None:
        index = index_of([1, 2, 3, 4, 5, 9, 9, 1, 2])
        assert index.lookup([9, 1, 2, 3], ahead=1, max_continuation=2)[0] == Match((4, 5), 3)
        assert index.lookup([2, 8], ahead=1) == []

    def test_a_repeat_goes_on_with_itself(self) -> None:
        index = index_of([7, 1, 2, 3, 1, 2, 3])
        assert index.lookup([1, 2, 3], max_continuation=7, max_matches=1) == [Match((1, 2, 3, 1, 2, 3, 1), 3)]
        ahead = index.lookup([2, 3, 1], ahead=1, max_continuation=4, max_matches=1)
        assert ahead == [Match((2, 3, 1, 2), 3)]

    def test_nothing_to_find(self) -> None:
        assert NgramIndex().lookup([]) == []
        assert index_of([1]).lookup([1]) == []
        assert index_of([1, 2, 3]).lookup([1, 2, 3]) == []

    def test_continuations_are_distinct(self) -> None:
        matches = index_of([1, 5, 1, 5, 1, 6, 1]).lookup([6, 1], max_continuation=1)
        assert [match.tokens for match in matches] == [(6,), (5,)]

    @pytest.mark.parametrize("seed", range(40))
    def test_equals_a_plain_search(self, seed: int) -> None:
        dice = random.Random(seed)
        text = [dice.randrange(dice.choice([2, 3, 6])) for _ in range(dice.randrange(60))]
        pending = [dice.randrange(3) for _ in range(dice.randrange(5))]
        index = NgramIndex(min_n=1 + seed % 2, max_n=4)
        for start in range(0, len(text), 7):
            index.extend(text[start : start + 7])
        path = text + pending
        tail = path[-(len(pending) + 4):]
        found = index.lookup(tail, ahead=len(pending), max_continuation=5, max_matches=3)
        assert found == plain_search(text, path, min_n=1 + seed % 2, max_n=4, count=5, most=3)

    def test_cost_does_not_grow_with_the_text(self) -> None:
        """The worst text for a search: one token for ever. Ten times the text, about the same time per
        token; a rescan would take ten times as long, the bound of five leaves room for a busy machine."""
        index = NgramIndex()

        def cost() -> float:
            times = []
            for _ in range(5):
                start = time.perf_counter()
                for _ in range(20):
                    index.extend([0])
                    index.lookup([0] * 6)
                times.append(time.perf_counter() - start)
            return min(times)

        index.extend([0] * 2000)
        short = cost()
        index.extend([0] * 18000)
        assert cost() < 5 * short

    @pytest.mark.parametrize("sizes", [{"min_n": 0}, {"min_n": 3, "max_n": 2}])
    def test_sizes_that_make_no_sense(self, sizes: dict[str, int]) -> None:
        with pytest.raises(UsageError, match="min_n"):
            NgramIndex(**sizes)


class TestRates:
    def test_starts_at_the_prior(self) -> None:
        rates = Rates(6)
        assert math.exp(rates.logprob(2, 0)) == pytest.approx(1 - 0.75**2)
        assert math.exp(rates.logprob(2, 1)) == pytest.approx(0.15 * (1 - 0.75**2))
        assert rates.logprob(99, 9) == rates.logprob(6, 3)

    def test_moves_to_what_is_seen(self) -> None:
        rates = Rates(6)
        for hit in (True, False, False):
            rates.note(1, 0, hit)
        assert math.exp(rates.logprob(1, 0)) == pytest.approx((1 + 4 * 0.25) / (3 + 4))
        assert math.exp(rates.logprob(1, 1)) == pytest.approx(0.15 * 0.25)

    def test_a_new_request_begins_with_what_others_have_shown(self) -> None:
        common = Rates(6)
        first = Rates(6, common)
        for _ in range(40):
            first.note(3, 0, False)
        assert math.exp(Rates(6, common).logprob(3, 0)) == pytest.approx(4 * (1 - 0.75**3) / 44)
        assert Rates(6, common).logprob(2, 0) == Rates(6).logprob(2, 0)

    def test_what_is_long_past_counts_less(self) -> None:
        rates = Rates(6)
        for hit in (False, True):
            for _ in range(2000):
                rates.note(3, 0, hit)
        assert math.exp(rates.logprob(3, 0)) > 0.9

    def test_is_always_a_probability(self) -> None:
        rates = Rates(6)
        for _ in range(1000):
            rates.note(6, 0, True)
            rates.note(1, 3, False)
        assert rates.logprob(6, 0) < 0
        assert -15 < rates.logprob(1, 3) < -5


class Talk:
    """One request's parts as the engine sends them; slot = order of arrival."""

    def __init__(self, source: NgramDraft, prompt: list[int], request: int = 0) -> None:
        self.source, self.request, self.slots = source, request, 0
        self.opening = Opening(request, len(prompt), SamplingParams())
        self.committed = 0
        self.last = self.commit(prompt, opens=[self.opening])

    def commit(self, tokens: list[int], opens: list[Opening] | None = None, fanout: int = 4) -> Expansion:
        """Rows that are committed on arrival; an answer is wanted for the last."""
        count = len(tokens)
        slots = list(range(self.slots, self.slots + count))
        positions = list(range(self.committed, self.committed + count))
        part = Part(self.request, slots, [-1] * (count - 1) + [slots[-1]], tokens, positions, slots,
                    [[] for _ in tokens], [False] * (count - 1) + [True])
        self.slots += count
        self.committed += count
        [self.last] = self.source.run(Flight(0, [part], opens or [], fanout=fanout))
        return self.last

    def guess(self, tokens: list[int]) -> list[Expansion]:
        """A chain of uncommitted rows below the newest committed one, each wanting an answer."""
        slots = list(range(self.slots, self.slots + len(tokens)))
        self.slots += len(tokens)
        positions = [self.committed + depth for depth in range(len(tokens))]
        part = Part(self.request, [], slots, tokens, positions, slots,
                    [slots[: depth + 1] for depth in range(len(tokens))], [True] * len(tokens))
        return self.source.run(Flight(1, [part], fanout=4))


def chains(expansion: Expansion) -> list[list[int]]:
    """From the node to every leaf of an expansion."""
    leaves = set(range(len(expansion.tokens))) - set(expansion.parents)
    result = []
    for leaf in sorted(leaves):
        chain = []
        while leaf >= 0:
            chain.append(expansion.tokens[leaf])
            leaf = expansion.parents[leaf]
        result.append(chain[::-1])
    return result


class TestSource:
    def test_answers_with_what_followed_as_one_tree(self) -> None:
        source = NgramDraft(max_continuation=3, max_n=3)
        expansion = Talk(source, [1, 2, 5, 6, 8, 1, 2, 5, 7, 8, 3, 1, 2]).last
        assert chains(expansion) == [[5, 7, 8], [5, 6, 8]]
        assert expansion.tokens == [5, 7, 8, 6, 8]
        assert expansion.parents == [-1, 0, 1, 0, 3]
        assert expansion.node == 12

    def test_log_probabilities_are_those_of_match_length_and_rank(self) -> None:
        source = NgramDraft(max_continuation=2, max_n=3)
        expansion = Talk(source, [1, 2, 5, 6, 8, 1, 2, 5, 7, 8, 3, 1, 2]).last
        prior = Rates(3)
        assert expansion.parents == [-1, 0, 0]
        assert expansion.logprobs == [prior.logprob(2, 0), prior.logprob(3, 0), prior.logprob(3, 1)]

    def test_uncommitted_rows_are_looked_up_on_their_own_path(self) -> None:
        talk = Talk(NgramDraft(max_continuation=2), [1, 2, 3, 4, 5, 6, 7, 1, 2])
        first, second = talk.guess([3, 9])
        assert chains(first) == [[4, 5]]
        assert chains(second) == []

    def test_fanout_bounds_the_children_of_every_guess(self) -> None:
        talk = Talk(NgramDraft(max_continuation=1), [1, 2, 1, 3, 1, 4, 1, 5, 1])
        assert talk.last.tokens == [5, 4, 3, 2]
        talk = Talk(NgramDraft(max_continuation=1), [1, 2, 1, 3, 1, 4, 1, 5])
        assert talk.commit([1], fanout=2).tokens == [5, 4]

    def test_learns_from_its_answers_and_not_from_the_prompt(self) -> None:
        talk = Talk(NgramDraft(max_continuation=1, max_n=1), [1, 2] * 20)
        prior = Rates(1, Rates(1))
        assert talk.last.logprobs == [prior.logprob(1, 0)]
        for _ in range(10):
            talk.commit([1])
            talk.commit([2])
        for _ in range(20):
            prior.note(1, 0, True)
        assert talk.last.logprobs == [prior.logprob(1, 0)]

    def test_what_it_learns_does_not_depend_on_how_commits_arrive(self) -> None:
        dice = random.Random(3)
        answer = [dice.randrange(4) for _ in range(40)]
        one, many = (Talk(NgramDraft(), [0, 1, 2, 3]) for _ in range(2))
        for token in answer:
            one.commit([token])
        for start in range(0, 40, 8):
            many.commit(answer[start : start + 8])
        assert one.last == many.last

    def test_a_row_that_left_the_committed_path_gets_nothing(self) -> None:
        talk = Talk(NgramDraft(), [1, 2, 1, 2, 1])
        stale = Part(0, [], [77], [1], [2], [2], [[]], [True])
        assert talk.source.run(Flight(5, [stale], fanout=4)) == [Expansion(77, [], [], [], learned=True)]

    def test_requests_do_not_see_each_other(self) -> None:
        source = NgramDraft(max_continuation=1)
        one, two = Talk(source, [1, 2, 1], request=0), Talk(source, [1, 3, 1], request=1)
        assert (one.last.tokens, two.last.tokens) == ([2], [3])
        assert source.run(Flight(9, closes=[0])) == []
        assert two.commit([3]).tokens == [1]
        assert Talk(source, [4, 5, 4], request=0).last.tokens == [5]

    def test_sizes_that_make_no_sense(self) -> None:
        with pytest.raises(UsageError, match="max_continuation"):
            build_ngram(max_continuation=0)
        with pytest.raises(UsageError, match="min_n"):
            build_ngram(min_n=0)


def test_needs_no_torch() -> None:
    code = "import fullpipe.stations.drafts.ngram, fullpipe.trace.recorder, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_who_begins_with_anothers_text_guesses_as_if_it_were_its_own_prompt() -> None:
    """The one whose it is ends with the job that opens the new one."""
    source = NgramDraft()
    before = Talk(source, [1, 2, 3, 4, 5, 1, 2])
    whole = Talk(NgramDraft(), [1, 2, 3, 4, 5, 1, 9, 3]).last
    opening = Opening(1, 8, SamplingParams(), list(range(6)))
    part = Part(1, [300, 7], [-1, 7], [9, 3], [6, 7], [300, 7], [[], []], [False, True])
    assert source.run(Flight(1, [part], [opening], [before.request], fanout=4)) == [whole]
    assert whole.tokens[:2] == [4, 5]
