"""A tiny random model cut into stages: a request that begins as a copy of another, in an arena that grows, says what it
says when all of it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import tiny
from fullpipe.messages import Flight, Landed, Opening, Part
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.weights import open_model
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import SamplingParams
from fullpipe.stations.target import ModelStage

PROMPT = [(7 * at * at + 3 * at) % tiny.VOCAB for at in range(45)]
SHARED = 37  # tokens that both prompts begin with: more than one run of slots
PARAMS = SamplingParams(temperature=0.8, seed=5, logprobs=3, repetition_penalty=1.2)
CUTS = [0, 2, 3, tiny.LAYERS]

Told = list[tuple[int, float]]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], InProcessPipeline]:
    folder: Path = tiny.save(tiny.tiny_model("qwen2", seed=2), tmp_path_factory.mktemp("target"))
    stages = [(first, last, DecoderSlice(open_model(folder), first, last, has_embedding=not first,
                                         has_head=last == tiny.LAYERS, dtype=torch.float32))
              for first, last in pairwise(CUTS)]
    return lambda: InProcessPipeline([ModelStage(part, is_last=last == tiny.LAYERS) for _, last, part in stages])


@dataclass
class Talk:
    """One request, a token at a time. slot: where a position stands. grown: how often the arena was enlarged."""

    pipeline: InProcessPipeline
    request: int
    flights: list[int]  # launched so far, by all requests
    slot: Callable[[int], int] = lambda position: position
    capacity: int = 128
    opened: bool = False
    slots: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    grown: int = 0

    def feed(self, tokens: list[int], *, copies: Talk | None = None, count: int = 0) -> Told:
        """Committed tokens, behind `count` that are copied from another request. What follows the last."""
        opens = []
        start = len(self.slots) + count
        positions = range(start, start + len(tokens))
        slots = [self.slot(position) for position in positions]
        if not self.opened or max(slots) >= self.capacity:
            self.grown += self.opened
            self.capacity = max(self.capacity, 1 + max(slots))
            opens = [Opening(self.request, self.capacity, len(PROMPT), PARAMS)]
        closes: list[int] = []
        if copies:
            opens[0].copy_from, opens[0].copied, closes = copies.request, copies.slots[:count], [copies.request]
            self.slots, self.tokens = list(range(count)), copies.tokens[:count]
        self.opened = True
        self.slots += slots
        self.tokens += tokens
        nodes = [-1] * (len(tokens) - 1) + [self.flights[0] + 1]
        part = Part(self.request, slots, nodes, tokens, list(positions), slots, [[] for _ in tokens],
                    [node > 0 for node in nodes])
        self.flights[0] += 1
        self.pipeline.launch(Flight(self.flights[0], [part], opens, closes))
        while True:
            for event in self.pipeline.events():
                if isinstance(event, Landed):
                    (told,) = event.logprobs
                    assert told[0][0] == event.tokens[0] and len(told) == 4
                    return told

    def speak(self, told: Told, count: int) -> list[Told]:
        """What is said from here on."""
        said = [told]
        for _ in range(count):
            said.append(self.feed([said[-1][0][0]]))
        return said


def test_a_copy_that_grows_says_what_the_whole_says(pipeline: Callable[[], InProcessPipeline]) -> None:
    """Bit for bit: tokens, and the log-probabilities that come with them."""
    one, other = pipeline(), pipeline()
    whole = Talk(one, 0, [0])
    expected = whole.speak(whole.feed(PROMPT), 60)
    flights = [0]
    source = Talk(other, 1, flights)
    source.speak(source.feed([*PROMPT[:SHARED], 1, 2, 3]), 5)
    copy = Talk(other, 2, flights, capacity=len(PROMPT))
    said = copy.speak(copy.feed(PROMPT[SHARED:], copies=source, count=SHARED), 60)
    assert copy.grown == 60 and copy.tokens == whole.tokens
    assert said == expected


def test_slots_in_another_order_are_put_in_order(pipeline: Callable[[], InProcessPipeline]) -> None:
    """Attention then adds up in another order, so that log-probabilities differ in the last bits. Tokens do not."""
    one, other = pipeline(), pipeline()
    whole = Talk(one, 0, [0])
    expected = whole.speak(whole.feed(PROMPT), 30)
    flights = [0]
    source = Talk(other, 1, flights, slot=lambda position: 29 * position % 128)
    source.speak(source.feed([*PROMPT[:SHARED], 1, 2, 3]), 5)
    copy = Talk(other, 2, flights, slot=lambda position: position)
    said = copy.speak(copy.feed(PROMPT[SHARED:], copies=source, count=SHARED), 30)
    assert [[token for token, _ in told] for told in said] == [[token for token, _ in told] for told in expected]
    for told, right in zip(said, expected):
        assert [value for _, value in told] == pytest.approx([value for _, value in right], abs=1e-4)
