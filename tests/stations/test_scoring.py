"""The last stage says how likely a prompt was: bit by bit what it would say of the same rows if their tokens had been
picked, in chunks or at once, in the company of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from fullpipe.messages import ArenaId, Flight, Landed, Opening, Part
from fullpipe.request import SamplingParams
from fullpipe.stations.scores import score_prompts
from fullpipe.stations.table import Tables
from fullpipe.stations.target import ModelStage, build_stage

PROMPT = torch.randint(0, tiny.VOCAB, (75,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.tiny_model("llama"), tmp_path_factory.mktemp("model") / "llama")


def stage(folder: Path, **more: Any) -> ModelStage:
    return build_stage(model=str(folder), first=0, last=tiny.LAYERS, is_first=True, is_last=True, dtype="float32",
                       kv_pool_mib=64, **more)


def opening(arena: int, prompt: list[int], params: SamplingParams) -> Opening:
    scored = prompt if params.prompt_logprobs is not None else []
    return Opening(ArenaId(arena), len(prompt), params, scored=scored)


def rows(arena: int, prompt: list[int], first: int, end: int, at: int, node: int = -1) -> Part:
    """Positions first..end of a prompt as the engine sends them. at: slot of its beginning. node: of its last row, if
    that is to be answered."""
    size, slots = end - first, [at + position for position in range(first, end)]
    last = [node] if node >= 0 else []
    return Part(ArenaId(arena), slots, [-1] * (size - len(last)) + last, prompt[first:end], list(range(first, end)),
                slots, [[] for _ in slots], [False] * (size - len(last)) + [True] * len(last))


def run(stage: ModelStage, *flights: Flight) -> list[Landed]:
    landed = [stage.run(flight, None) for flight in flights]
    assert all(isinstance(one, Landed) for one in landed)
    return landed  # type: ignore[return-value]


@pytest.mark.parametrize("chunk", [1, 7, 40, 75])
def test_it_is_what_transformers_says_in_any_chunks(folder: Path, chunk: int) -> None:
    params = SamplingParams(prompt_logprobs=3)
    flights = [Flight(number, [rows(0, PROMPT, first, min(first + chunk, len(PROMPT)), 0)])
               for number, first in enumerate(range(0, len(PROMPT), chunk))]
    flights[0].opens = [opening(0, PROMPT, params)]
    scores = [score for landed in run(stage(folder), *flights) for score in landed.prompts]
    assert [score.position for score in scores] == list(range(1, len(PROMPT)))
    with torch.inference_mode():
        logits = tiny.tiny_model("llama")(torch.tensor([PROMPT])).logits[0].float()
    for score, given in zip(scores, logits.log_softmax(-1), strict=False):
        own = PROMPT[score.position]
        assert score.told[0][0] == own and score.rank == 1 + int((given > given[own]).sum())
        assert [token for token, _ in score.told[1:]] == given.topk(3).indices.tolist()
        for token, logprob in score.told:
            assert logprob == pytest.approx(float(given[token]), abs=1e-4)


def test_company_and_chunks_change_no_bit(folder: Path) -> None:
    params, other = SamplingParams(prompt_logprobs=2), PROMPT[::-1]
    alone = run(stage(folder), Flight(0, [rows(0, PROMPT, 0, 75, 0)], [opening(0, PROMPT, params)]))[0].prompts
    both = run(stage(folder), Flight(0, [rows(5, other, 0, 40, 512), rows(0, PROMPT, 0, 30, 0)],
                                     [opening(5, other, SamplingParams()), opening(0, PROMPT, params)]),
               Flight(1, [rows(0, PROMPT, 30, 75, 0)]))
    assert [score for landed in both for score in landed.prompts] == alone


def test_it_is_what_logprobs_would_say_of_the_same_row(folder: Path) -> None:
    """The row before the last, asked as one of a prompt and as one to be answered."""
    scored = run(stage(folder), Flight(0, [rows(0, PROMPT, 0, 75, 0)],
                                       [opening(0, PROMPT, SamplingParams(prompt_logprobs=4))]))[0].prompts[-1]
    short = PROMPT[:-1]
    (landed,) = run(stage(folder), Flight(0, [rows(0, short, 0, 74, 0, node=3)],
                                          [opening(0, short, SamplingParams(logprobs=4))]))
    assert landed.prompts == []
    assert landed.logprobs[0][1:] == scored.told[1:]


def test_what_was_said_before_is_no_prompt(folder: Path) -> None:
    """A request that goes on after a failure sends its text again as rows that nobody asks about."""
    params, said = SamplingParams(prompt_logprobs=0), [*PROMPT[:20], 7, 8, 9]
    flight = Flight(0, [rows(0, said, 0, 23, 0, node=1)],
                    [Opening(ArenaId(0), 20, params, scored=PROMPT[:20])])
    (landed,) = run(stage(folder), flight)
    assert [score.position for score in landed.prompts] == list(range(1, 20)) and landed.nodes == [1]


def test_padding_of_the_head_is_no_token() -> None:
    """Here it would be the likeliest."""
    tables, prompt = Tables(), [1, 2]
    tables.open([opening(0, prompt, SamplingParams(prompt_logprobs=1))])
    flight = Flight(0, [rows(0, prompt, 0, 2, 0)])
    tables[ArenaId(0)].apply(flight.parts[0])
    logits = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    (score,) = score_prompts(flight, tables, lambda rows: logits, limit=3)
    assert (score.rank, [token for token, _ in score.told]) == (1, [2, 2])
    assert score.told[0][1] == pytest.approx(float(logits[0, :3].log_softmax(0)[2]))


def test_the_head_is_asked_for_few_rows_at_a_time_and_for_none_without_need() -> None:
    sizes: list[int] = []

    def logits(rows: list[int]) -> Tensor:
        sizes.append(len(rows))
        return torch.zeros(len(rows), 96)

    tables = Tables()
    tables.open([opening(0, PROMPT, SamplingParams(prompt_logprobs=1)), opening(1, PROMPT, SamplingParams())])
    parts = [rows(1, PROMPT, 0, 75, 512), rows(0, PROMPT, 0, 75, 0)]
    for part in parts:
        tables[part.arena].apply(part)
    scores = score_prompts(Flight(0, parts), tables, logits)
    assert sizes == [32, 32, 10] and len(scores) == 74
    assert score_prompts(Flight(1, parts[:1]), tables, logits) == [] and len(sizes) == 3
