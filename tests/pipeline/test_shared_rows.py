"""A tiny random model cut into stages: a request that reads another's rows says what it says when it computes all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import tiny
from fullpipe.messages import ArenaId, Flight, Landed, Opening, Part
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
                                         has_head=last == tiny.LAYERS, dtype=torch.float32, slots=1 << 11))
              for first, last in pairwise(CUTS)]
    return lambda: InProcessPipeline([ModelStage(part, is_last=last == tiny.LAYERS) for _, last, part in stages])


@dataclass
class Talk:
    """One request, a token at a time. slot: where a position stands."""

    pipeline: InProcessPipeline
    request: int
    flights: list[int]  # launched so far, by all requests
    slot: Callable[[int], int] = lambda position: position
    opened: bool = False
    slots: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def feed(self, tokens: list[int], *, behind: Talk | None = None, count: int = 0) -> Told:
        """Committed tokens, behind `count` of another request, which ends. What follows the last."""
        opens, closes = [], []
        if behind:
            self.slots, self.tokens, closes = behind.slots[:count], behind.tokens[:count], [ArenaId(behind.request)]
        if not self.opened:
            opens = [Opening(ArenaId(self.request), len(PROMPT), PARAMS, list(self.slots))]
        positions = range(len(self.slots), len(self.slots) + len(tokens))
        slots = [self.slot(position) for position in positions]
        self.opened = True
        self.slots += slots
        self.tokens += tokens
        nodes = [-1] * (len(tokens) - 1) + [self.flights[0] + 1]
        part = Part(ArenaId(self.request), slots, nodes, tokens, list(positions), slots, [[] for _ in tokens],
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


def scattered(position: int) -> int:
    """Slots of several blocks, in no order."""
    return 400 + 293 * position % 700


@pytest.mark.parametrize("slot", [lambda position: 300 + position, scattered], ids=["in order", "scattered"])
def test_what_begins_with_anothers_rows_says_what_the_whole_says(pipeline: Callable[[], InProcessPipeline],
                                                                 slot: Callable[[int], int]) -> None:
    """Bit for bit: tokens, and the log-probabilities that come with them."""
    one, other = pipeline(), pipeline()
    whole = Talk(one, 0, [0])
    expected = whole.speak(whole.feed(PROMPT), 60)
    flights = [0]
    source = Talk(other, 1, flights, slot=slot)
    source.speak(source.feed([*PROMPT[:SHARED], 1, 2, 3]), 5)
    later = Talk(other, 2, flights)
    said = later.speak(later.feed(PROMPT[SHARED:], behind=source, count=SHARED), 60)
    assert later.tokens == whole.tokens and said == expected
