"""The tour of docs/life-of-a-token.md, walked: one request on a tiny random model, three stages and a draft.

The hero is the first token of the answer. Every stage step and every draft call takes one second of the
virtual clock, so each stop says when it happens. Headings carry the numbers of the tour's stops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pytest
import tokenizers
import torch

import tiny
from fullpipe import Chunk, SamplingParams
from fullpipe.events import Died, Emitted, Finished, Launched
from fullpipe.messages import Drafted, Event, Landed
from simulated import simulated

PROMPT = "w1 w17 w9 w33 w17 w9"
LAST_OF_PROMPT = 5  # its position
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
STAGES, WIDTH = 3, 4

_Event = TypeVar("_Event", bound=Event)


@dataclass(slots=True)
class Told:
    """What a listener heard and a user read of one request, and the same request's text from `pp`."""

    events: list[Event]
    chunks: list[Chunk]
    plain: list[int]

    def first(self, kind: type[_Event], that: Callable[[_Event], bool]) -> _Event:
        return next(event for event in self.events if isinstance(event, kind) and that(event))

    def come_in_this_order(self, *events: Event) -> bool:
        places = [next(i for i, other in enumerate(self.events) if other is event) for event in events]
        return places == sorted(places)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    target, draft = write_models(tmp_path_factory.mktemp("models"))
    events: list[Event] = []
    with simulated(target, draft=draft, stages=STAGES, method="fullpipe", width=WIDTH, dtype="float32",
                   listeners=[events.append]) as llm:
        chunks = list(llm.stream(PROMPT, PARAMS))
        heard = events.copy()
        llm.use("pp")
        (plain,) = llm.generate(PROMPT, PARAMS)
    return Told(heard, chunks, plain.token_ids)


def write_models(root: Path) -> tuple[str, str]:
    """A target whose words are w0 to w95, and a draft that is mostly but not always right: the target's
    weights, disturbed."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model = tiny.tiny_model("qwen2", seed=1)
    target = tiny.save(model, root / "target")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    draft = tiny.save(model, root / "draft")
    for folder in (target, draft):
        words.save(str(folder / "tokenizer.json"))
    return str(target), str(draft)


def test_the_life_of_a_token(told: Told) -> None:
    # Stops 1 to 4. The prompt becomes a request, a track and a flight. The root, the last prompt token, rides
    # behind the others (node -1, which nobody asks about), so at second 0 all of the prompt enters stage 0.
    prompt_enters = told.first(Launched, lambda event: True)
    (root,) = prompt_enters.nodes
    assert (prompt_enters.time, prompt_enters.parents, prompt_enters.positions) == (0, [-1], [LAST_OF_PROMPT])
    prompt_lands = told.first(Landed, lambda event: root in event.nodes)
    assert [leg.nodes for leg in prompt_lands.legs] == [[-1] * LAST_OF_PROMPT + [root]] * STAGES
    hero = prompt_lands.tokens[0]  # what the model will say; so far nobody knows

    # Stops 5 and 6. Meanwhile the draft has been asked what follows the root. The hero is among its guesses.
    drafted = told.first(Drafted, lambda event: event.expansions[0].node == root)
    assert drafted.time == 1 and hero in drafted.expansions[0].tokens

    # Stops 7 and 8. Stage 0 is free, and the method wants the likeliest guesses in it: hero and rivals get
    # a node and a slot each and enter as one flight, two seconds before anyone can say which of them is right.
    launched = told.first(Launched, lambda event: hero in event.tokens and event.parents[0] == root)
    assert launched.time == 1 and launched.parents == [root] * WIDTH
    assert launched.positions == [LAST_OF_PROMPT + 1] * WIDTH
    node = launched.nodes[launched.tokens.index(hero)]
    rivals = [other for other in launched.nodes if other != node]

    # Stop 9. Stage by stage, a second each, one stage behind the prompt.
    landed = told.first(Landed, lambda event: node in event.nodes)
    assert [(leg.station, leg.start, leg.end) for leg in landed.legs] == [
        ("stage 0", 1, 2), ("stage 1", 2, 3), ("stage 2", 3, 4)]
    assert all(node in leg.nodes for leg in landed.legs)

    # Stops 10 and 11. At second 3 the root lands and the last stage's word on it is the hero. The commit rule
    # makes the hero the root, and its rivals die: a hit, for two of three stages are already behind it.
    died = told.first(Died, lambda event: True)
    emitted = told.first(Emitted, lambda event: True)
    assert (emitted.token, emitted.position, emitted.hit) == (hero, LAST_OF_PROMPT + 1, True)
    assert prompt_lands.time == died.time == emitted.time == 3
    assert set(rivals) <= set(died.nodes) and node not in died.nodes

    # The rivals were called back: the last stage, which had not begun with them, computed the hero alone.
    assert [leg.nodes for leg in landed.legs] == [launched.nodes, launched.nodes, [node]]

    # Stop 12. The user reads it.
    assert told.chunks[0].token_ids == [hero] and told.chunks[0].text == f" w{hero}"

    # And on. At second 4 the hero's own row lands and says what comes next: one second a token, not three.
    successor = told.first(Emitted, lambda event: event.node == node)
    assert landed.time == successor.time == 4 and successor.token == landed.tokens[0]

    assert told.come_in_this_order(prompt_enters, drafted, launched, prompt_lands, died, emitted, landed, successor)


def test_what_was_read_is_what_was_emitted_and_what_the_model_alone_says(told: Told) -> None:
    emitted = [event for event in told.events if isinstance(event, Emitted)]
    tokens = [event.token for event in emitted]
    assert tokens == told.plain
    assert tokens == [token for chunk in told.chunks for token in chunk.token_ids]
    assert "".join(chunk.text for chunk in told.chunks) == "".join(f" w{token}" for token in tokens)
    assert [event.position for event in emitted] == list(range(LAST_OF_PROMPT + 1, LAST_OF_PROMPT + 1 + len(tokens)))
    assert told.first(Finished, lambda event: True).reason == "length"


def test_every_token_was_decided_by_the_landing_of_the_one_before(told: Told) -> None:
    said = {node: token for event in told.events if isinstance(event, Landed)
            for node, token in zip(event.nodes, event.tokens)}
    emitted = [event for event in told.events if isinstance(event, Emitted)]
    assert all(said[event.node] == event.token for event in emitted)
    carried = {node: token for event in told.events if isinstance(event, Launched)
               for node, token in zip(event.nodes, event.tokens)}
    for event, following in pairwise(emitted):
        assert carried[following.node] == event.token


def test_a_node_never_both_dies_and_is_committed(told: Told) -> None:
    committed = {event.node for event in told.events if isinstance(event, Emitted)}
    finished = next(i for i, event in enumerate(told.events) if isinstance(event, Finished))
    died = [node for event in told.events[:finished] if isinstance(event, Died) for node in event.nodes]
    assert len(died) == len(set(died))
    assert not committed & set(died)
