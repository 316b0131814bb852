"""The text of each of 17 requests, alone and among the 16 others: what transformers' own forward says, in float32.

Tiny random models; greedy and sampled, with and without penalties, of all lengths, some of which begin alike.
`bench/serving/alone.py` asks the same of a real model, through the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from msgspec import to_builtins

import tiny
from driving import TellingEngine
from fullpipe.costs import CostCurve, Machine
from fullpipe.events import Emitted, Launched
from fullpipe.messages import Event
from fullpipe.methods import make_method
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.sampling import RowContext, pick
from fullpipe.stations.spec import StationSpec

COUNT, TOKENS = 17, 10
CURVE = CostCurve.of(lambda rows: 1 + 0.01 * rows)
KINDS = (
    {},
    {"temperature": 1.0},
    {"logprobs": 3},
    {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "min_p": 0.01},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.2, "presence_penalty": 0.3},
)


def _requests() -> list[Request]:
    """Every third begins with the same 20 tokens; the sampled ones have seeds of their own."""
    generator = torch.Generator().manual_seed(3)

    def words(count: int) -> list[int]:
        return torch.randint(3, 40, (count,), generator=generator).tolist()

    beginning, made = words(20), []
    for k in range(COUNT):
        prompt = [*(beginning if k % 3 == 0 else []), *words(1 + 5 * k % 43)]
        params = SamplingParams(max_tokens=TOKENS, seed=k, ignore_eos=True, **KINDS[k % len(KINDS)])
        made.append(Request(k, tuple(prompt), params))
    return made


REQUESTS = _requests()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.tiny_model("qwen2", seed=1), tmp_path_factory.mktemp("among") / "target")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> StationSpec:
    """N-grams, and the target with its weights disturbed: sometimes wrong."""
    model = tiny.tiny_model("qwen2", seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    folder = tiny.save(model, tmp_path_factory.mktemp("among") / "draft")
    parts = [("ngram:build_ngram", {}), ("model:build_draft_model", {"model": str(folder), "dtype": "float32"})]
    sources = [to_builtins(StationSpec(f"fullpipe.stations.drafts.{builder}", args)) for builder, args in parts]
    return StationSpec("fullpipe.stations.drafts.mix:build_mix", {"drafts": sources})


@pytest.fixture(scope="module")
def truth(target: Path) -> list[list[int]]:
    """What transformers' model says with our sampler, one request at a time, the whole path anew for every token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target).eval()
    said = []
    for request in REQUESTS:
        tokens, begin = list(request.prompt), len(request.prompt)
        while len(tokens) < begin + TOKENS:
            with torch.inference_mode():
                logits = model(torch.tensor([tokens])).logits[0, -1:]
            path = torch.tensor(tokens).numpy()
            row = RowContext(request.params, len(tokens), lambda path=path, at=begin: (path[:at], path[at:]))
            tokens += pick(logits, [row])[0]
        said.append(tokens[begin:])
    return said


def specs(target: Path, ends: tuple[int, ...]) -> list[StationSpec]:
    """ends: layers finished after each stage."""
    return [StationSpec("fullpipe.stations.target:build_stage", {
        "model": str(target), "first": first, "last": last, "is_first": first == 0, "is_last": last == tiny.LAYERS,
        "dtype": "float32"}) for first, last in pairwise((0, *ends))]


class Crowd:
    """Runs requests through one engine, each time under new ids. most: requests that ran at a time. mixed: the most
    requests of one flight. hits: tokens that had been guessed."""

    def __init__(self, engine: TellingEngine) -> None:
        self.engine = engine
        self.most = self.mixed = self.hits = 0
        self._said: dict[int, list[int]] = {}
        self._next = 0
        engine.listen(self._hear)

    def say(self, requests: Sequence[Request]) -> list[list[int]]:
        ids = range(self._next, self._next + len(requests))
        self._next = ids.stop
        for id, request in zip(ids, requests):
            self._said[id] = []
            self.engine.submit(Request(id, request.prompt, request.params))
        while self.engine.busy:
            self.engine.step()
            self.engine.check()
            self.most = max(self.most, self.engine.num_running)
        return [self._said[id] for id in ids]

    def _hear(self, event: Event) -> None:
        if isinstance(event, Launched):
            self.mixed = max(self.mixed, len({*event.requests}))
        elif isinstance(event, Emitted):
            self._said[event.request].append(event.token)
            self.hits += event.hit


def machine(stages: int) -> Machine:
    return Machine(stages, CURVE, CURVE)


@pytest.mark.parametrize(("method", "ends"), [("fullpipe", (2, 4, 5)), ("pp", (3, 5))])
def test_alone_and_among_sixteen_others_it_is_what_transformers_says(
        target: Path, draft: StationSpec, truth: list[list[int]], method: str, ends: tuple[int, ...]) -> None:
    """Among the others prompts also begin with rows that stayed in the caches, computed for others."""
    guesses, stages = method != "pp", len(ends)
    pipeline = InProcessPipeline([spec.build() for spec in specs(target, ends)],  # type: ignore[misc]
                                 draft.build() if guesses else None,  # type: ignore[arg-type]
                                 costs=lambda station, rows, measured, context: CURVE(rows))
    crowd = Crowd(TellingEngine(pipeline, make_method(method, machine=machine(stages)),
                                prefill_chunk=16, fanout=4, kv_cache_tokens=9000, block_size=32,
                                enable_prefix_caching=True))
    assert [said for request in REQUESTS for said in crowd.say([request])] == truth
    assert crowd.most == crowd.mixed == 1
    alone, crowd.hits = crowd.hits, 0
    assert crowd.say(REQUESTS[::-1]) == truth[::-1]
    assert crowd.most == COUNT and crowd.mixed > COUNT // 3
    assert (alone > 0, crowd.hits > 0) == (guesses, guesses)


@pytest.mark.processes
def test_so_it_is_through_processes(target: Path, draft: StationSpec, truth: list[list[int]]) -> None:
    """Two stage processes and one that guesses, on the wall clock: what shares a flight with what is chance."""
    pipeline = WorkersPipeline(specs(target, (3, 5)), draft)
    try:
        crowd = Crowd(TellingEngine(pipeline, make_method("fullpipe", machine=machine(2)), prefill_chunk=16, fanout=4,
                                    kv_cache_tokens=9000, block_size=32, enable_prefix_caching=True))
        assert [crowd.say([REQUESTS[0]]), crowd.say(REQUESTS)] == [truth[:1], truth]
        assert crowd.most == COUNT and crowd.mixed > 1
    finally:
        pipeline.close()
