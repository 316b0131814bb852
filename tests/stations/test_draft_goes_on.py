"""A draft that goes on by itself says, level by level, what it says when it is asked about each node alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch

import tiny
from fullpipe.messages import Expansion, Flight, Opening, Part
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.weights import open_model
from fullpipe.request import SamplingParams
from fullpipe.stations.base import DraftLike
from fullpipe.stations.drafts.mix import Mix
from fullpipe.stations.drafts.model import DraftModel
from fullpipe.stations.drafts.ngram import NgramDraft
from fullpipe.stations.drafts.scripted import ScriptedDraft

PROMPT = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
SLOTS = [14, 11, 13, 12, 10]  # in no order
FANOUT = 4
PARAMS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=1.0, seed=7),
    "penalties": SamplingParams(temperature=0.8, top_k=40, seed=11, repetition_penalty=1.2, presence_penalty=0.3),
}
Make = Callable[[], DraftLike]


def asked(rows: list[tuple[int, int]], *, first: bool = False, params: SamplingParams = PARAMS["greedy"],
          ahead: list[int] | None = None, least: float = -math.inf) -> Flight:
    """A job about the last of these (token, slot), which follow each other behind the prompt. first: they, and the
    prompt before, are sent; else the last one alone."""
    root, path = len(PROMPT) - 1, [slot for _, slot in rows]
    part = Part(0, [], [100 + len(rows)], [rows[-1][0] if rows else PROMPT[-1]], [root + len(rows)],
                [rows[-1][1] if rows else root], [path], [True], ahead or [])
    if first:
        prompt = Part(0, list(range(root + 1)), [-1] * root, PROMPT[:-1], list(range(root)), list(range(root)),
                      [[]] * root, [False] * root)
        part = Part(0, prompt.commits, *(getattr(prompt, name) + getattr(part, name) for name in
                                         ("nodes", "tokens", "positions", "slots", "paths", "wants")), part.ahead)
    opens = [Opening(0, len(PROMPT), params)] if first else []
    return Flight(0, [part], opens, fanout=FANOUT, least=least)


def deep(draft: DraftLike, params: SamplingParams, ahead: list[int] = SLOTS, least: float = -math.inf) -> Expansion:
    (said,) = draft.run(asked([], first=True, params=params, ahead=ahead, least=least))
    return said


def level_by_level(draft: DraftLike, params: SamplingParams, levels: int) -> list[Expansion]:
    """What it says of the root, of the likeliest that follows, and so on."""
    said = [deep(draft, params, [])]
    rows: list[tuple[int, int]] = []
    for slot in SLOTS[:levels]:
        rows.append((said[-1].tokens[0], slot))
        said += draft.run(asked(rows))
    return said


def by_level(said: Expansion) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities behind the node and behind each that was computed."""
    places = [[at for at, parent in enumerate(said.parents) if parent == under] for under in (-1, *said.computed)]
    return [([said.tokens[at] for at in own], [said.logprobs[at] for at in own]) for own in places]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Make:
    files = open_model(tiny.save(tiny.tiny_model("qwen2", seed=1), Path(tmp_path_factory.mktemp("model"))))
    return lambda: DraftModel(DecoderSlice(files, 0, tiny.LAYERS, has_embedding=True, has_head=True,
                                           dtype=torch.float32))


@pytest.fixture(params=["model", "scripted"])
def make(request: pytest.FixtureRequest, model: Make) -> Make:
    return model if request.param == "model" else lambda: ScriptedDraft({"kind": "hash", "vocab": 50, "seed": 3})


@pytest.mark.parametrize("kind", PARAMS)
def test_each_level_is_what_it_would_be_alone(make: Make, kind: str) -> None:
    said = deep(make(), PARAMS[kind])
    alone = level_by_level(make(), PARAMS[kind], len(SLOTS))
    assert by_level(said) == [(one.tokens, one.logprobs) for one in alone]
    assert len(said.computed) == len(SLOTS) and len(said.tokens) == (1 + len(SLOTS)) * FANOUT


def test_what_it_has_computed_stays_in_its_slots(make: Make) -> None:
    """A later question behind the chain is answered as if each of its nodes had been asked about."""
    params, draft, other = PARAMS["sampled"], make(), make()
    said = deep(draft, params)
    level_by_level(other, params, len(SLOTS))
    rows = [(said.tokens[index], slot) for index, slot in zip(said.computed, SLOTS)]
    assert draft.run(asked([*rows, (7, 20)])) == other.run(asked([*rows, (7, 20)]))
    assert draft.run(asked([*rows[:2], (8, 21)])) == other.run(asked([*rows[:2], (8, 21)]))


@pytest.mark.parametrize("steps", range(4))
def test_it_stops_where_the_chain_is_too_unlikely(make: Make, steps: int) -> None:
    whole = deep(make(), PARAMS["greedy"])
    chains = list(accumulate(min(whole.logprobs[index], 0.0) for index in whole.computed))
    said = deep(make(), PARAMS["greedy"], least=(chains[steps] + chains[steps - 1]) / 2 if steps else chains[0] / 2)
    assert said.computed == whole.computed[:steps]
    assert by_level(said) == by_level(whole)[: steps + 1]


def test_the_slots_are_for_the_first_row_that_is_wanted_of_each_part(make: Make) -> None:
    draft, job = make(), asked([], first=True)
    draft.run(job)
    rows = [Part(0, [], [5, 6, 7], [3, 4, 5], [10, 10, 10], [20, 21, 22], [[20], [21], [22]], [False, True, True],
                 SLOTS[:2])]
    first, second = draft.run(Flight(1, rows, fanout=FANOUT, least=-math.inf))
    assert (first.node, len(first.computed)) == (6, 2) and (second.node, second.computed) == (7, [])


# ---- mixtures ----------------------------------------------------------------------------------------------


REPEATS = {"kind": "text", "tokens": [3, 4, 1, 2] * 5}


def mixed(first: DraftLike | None = None) -> Mix:
    return Mix([first or ScriptedDraft(REPEATS, accuracy=1.0), NgramDraft()])


def test_in_a_mixture_the_first_goes_on_and_the_others_know_the_slots() -> None:
    draft, other = mixed(), mixed()
    said = deep(draft, PARAMS["greedy"])
    chain = [said.tokens[index] for index in said.computed]
    assert chain == [3, 4, 1, 2, 3]
    assert [said.parents[index] for index in said.computed] == [-1, *said.computed[:-1]]
    level_by_level(other, PARAMS["greedy"], len(SLOTS))
    rows = [*zip(chain, SLOTS), (4, 20)]
    (answer,), (expected,) = draft.run(asked(rows)), other.run(asked(rows))
    assert answer == expected
    assert max(answer.parents) > 0, "prompt lookup has found this text in the prompt"


@pytest.mark.parametrize("kind", PARAMS)
def test_beside_a_model_the_chain_is_the_models(model: Make, kind: str) -> None:
    said, alone = deep(mixed(model()), PARAMS[kind]), deep(model(), PARAMS[kind])
    assert [said.tokens[index] for index in said.computed] == [alone.tokens[index] for index in alone.computed]


def test_who_comes_second_in_a_mixture_does_not_go_on(model: Make) -> None:
    said = deep(Mix([NgramDraft(), model()]), PARAMS["greedy"])
    assert said.computed == []
