"""Merging guesses of several sources into one tree."""

import math

import pytest

from fullpipe.messages import ArenaId, Expansion, Flight, Part, Tap
from fullpipe.stations.drafts.mix import Mix, merge


def expansion(*guesses: tuple[int, float, int], source: int = 0) -> Expansion:
    return Expansion(4, [t for t, _, _ in guesses], [math.log(p) for _, p, _ in guesses], [u for _, _, u in guesses],
                     sources=[source] * len(guesses))


def test_every_guess_once_and_chains_kept() -> None:
    model = expansion((10, 0.6, -1), (11, 0.3, -1), (12, 0.1, -1), source=1)
    ngram = expansion((11, 0.5, -1), (20, 0.8, 0), (21, 0.9, 1), (30, 0.4, -1), source=2)
    merged = merge([model, ngram])
    assert merged.tokens == [10, 11, 12, 20, 21, 30]
    assert merged.parents == [-1, -1, -1, 1, 3, -1]
    assert merged.sources == [1, 3, 1, 2, 2, 2]
    assert [math.exp(logprob) for logprob in merged.logprobs] == pytest.approx([0.6, 0.4, 0.1, 0.8, 0.9, 0.2])


def test_nothing_is_discounted_where_the_first_draft_is_silent() -> None:
    chain = expansion((1, 0.9, -1), (2, 0.8, 0))
    assert merge([Expansion(4, [], [], []), chain]) == chain


def test_the_same_chain_twice_is_one_chain() -> None:
    chain = expansion((1, 0.9, -1), (2, 0.8, 0))
    merged = merge([chain, chain])
    assert (merged.tokens, merged.parents) == ([1, 2], [-1, 0])
    assert merged.logprobs == pytest.approx(chain.logprobs)


class Eager:
    """Answers every wanted row with one guess, and keeps what it was sent."""

    def __init__(self) -> None:
        self.jobs: list[Flight] = []

    def run(self, job: Flight) -> list[Expansion]:
        self.jobs.append(job)
        return [Expansion(node, [node], [-1.0], [-1]) for part in job.parts
                for node, wanted in zip(part.nodes, part.wants) if wanted]


def test_later_sources_are_asked_about_the_first_rows_and_see_all() -> None:
    def part(request: int, nodes: list[int], wants: list[bool]) -> Part:
        return Part(request, [7], nodes, nodes, nodes, nodes, [[node] for node in nodes], wants)

    first, second = Eager(), Eager()
    job = Flight(0, [part(0, [1, 2, 3], [True, False, True]), part(1, [4, 5], [True, True])], fanout=4)
    answers = Mix([first, second], second=3).run(job)
    assert [answer.node for answer in answers] == [1, 3, 4, 5]
    assert first.jobs == [job]
    (seen,) = second.jobs
    assert [answer.sources for answer in answers] == [[3], [3], [3], [1]]
    assert [p.wants for p in seen.parts] == [[True, False, True], [True, False]]
    assert [(p.nodes, p.commits) for p in seen.parts] == [(p.nodes, p.commits) for p in job.parts]


class Late(Eager):
    """Answers for nothing until it is told to, and then for that."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[int] = []

    def run(self, job: Flight) -> list[Expansion]:
        answers, self.answers = self.answers, []
        return [Expansion(node, [99], [-1.0], [-1]) for node in answers]

    def take(self, tap: Tap) -> None:
        pass

    def ready(self, job: Flight) -> bool:
        return True

    def forget(self, nodes: list[int]) -> None:
        pass


def test_what_is_held_for_the_first_draft_ends_with_the_arena() -> None:
    def asks(arena: int, node: int) -> Part:
        return Part(ArenaId(arena), [], [node], [node], [node], [node], [[node]], [True])

    late = Late()
    mix = Mix([late, Eager()])
    assert mix.run(Flight(0, [asks(0, 1), asks(1, 2), asks(1, 3)], fanout=4)) == []
    assert sorted(mix._held) == [1, 2, 3]
    late.answers = [3]
    (answer,) = mix.run(Flight(1))
    assert (answer.node, answer.tokens) == (3, [99, 3])
    assert mix.run(Flight(2, closes=[ArenaId(1)])) == [] and sorted(mix._held) == [1]
    mix.forget([1])
    assert not mix._held and not mix._open
