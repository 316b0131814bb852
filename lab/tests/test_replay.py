"""A replay is the run: event by event what the in-process pipeline does with the real stages and the real draft."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from fullpipe.engine import Engine, RequestStats
from fullpipe.errors import UsageError
from fullpipe.events import Died, Emitted, Finished, Launched
from fullpipe.hub import resolve
from fullpipe.messages import Drafted, Event, Flight, Landed, Ready
from fullpipe.methods import METHODS, make_method, options_of
from fullpipe.models.decoder import DecoderSlice
from fullpipe.models.dtypes import DTYPES
from fullpipe.models.step import Step
from fullpipe.models.tokens.loading import load_tokenizer
from fullpipe.models.weights import open_model
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.drafts.mix import Mix
from fullpipe.stations.drafts.model import DraftModel
from fullpipe.stations.drafts.ngram import NgramDraft
from fullpipe.stations.target import ModelStage, build_stage
from fullpipe_lab.clusters import Cluster, unit_cluster
from fullpipe_lab.memo import TOP_K, Memo, MemoDraft
from fullpipe_lab.recording import Answer
from fullpipe_lab.replay import RecordedStage, replay

STAGES, TOKENS, WIDTH = 4, 18, 3
PROMPT = (3, 17, 42, 8, 17, 42, 9, 60, 71, 5, 17, 42)

# Nothing divides anything here: stages differ, links have latency and bandwidth, and rows cost time.
_CLUSTER = """
[cluster]
name = "small machines"
kind = "modelled"

[target]
name = "target"
layers = 5
layer_params = 40_000
head_params = 6_000
hidden = 64
kv_size = 64

[draft]
name = "draft"
layers = 2
layer_params = 20_000
head_params = 6_000
hidden = 64
kv_size = 64

[[devices]]
name = "board"
count = 5
bandwidth_gb_s = 0.031
tflop_s = 0.00007
overhead_ms = 0.21

[links]
latency_ms = {latency}
bandwidth_mbit_s = 7

[placement]
stages = ["board0", "board1", "board2", "board3"]
draft = "{draft}"
"""


@cache
def cluster(name: str) -> Cluster:
    match name:
        case "unit":
            return unit_cluster(STAGES)
        case "links":
            return Cluster.parse(_CLUSTER.format(latency=0.43, draft="board4"), name, Path())
    return Cluster.parse(_CLUSTER.format(latency=1.7, draft="board0"), name, Path())  # draft and stage 0 share a board


@dataclass(frozen=True)
class Models:
    """stages: of the target. draft, memo: the whole of the draft, with a cache for the run and one for the memo. All at
    one dtype."""

    stages: list[ModelStage]
    draft: DecoderSlice
    memo: DecoderSlice


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and a draft that is the target with noise in its weights."""
    root = tmp_path_factory.mktemp("models")
    model = tiny.tiny_model("qwen3", seed=4)
    target = tiny.save(model, root / "target")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return target, tiny.save(model, root / "draft")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def models(folders: tuple[Path, Path], request: pytest.FixtureRequest) -> Iterator[Models]:
    yield load(*folders, dtype=request.param, cuts=(0, 1, 2, 4, tiny.LAYERS))


def load(target: Path, draft: Path, *, dtype: str, cuts: tuple[int, ...], vocab: int | None = None) -> Models:
    stages = [build_stage(model=str(target), first=first, last=last, is_first=first == 0, is_last=last == cuts[-1],
                          dtype=dtype, vocab=vocab) for first, last in pairwise(cuts)]
    files = open_model(draft)
    models = Models(stages, *(DecoderSlice(files, 0, files.config.num_layers, has_embedding=True, has_head=True,
                                           dtype=DTYPES[dtype]) for _ in range(2)))
    if not same_in_any_company(models.memo):
        pytest.skip(f"torch gives a row other bits in other company here, in {dtype}: a memo computes in others")
    return models


@torch.inference_mode()
def same_in_any_company(slice: DecoderSlice) -> bool:
    """Whether the logits of a text have the same bits in steps of one row and of several. On some processors torch's
    products do not give that."""
    tokens, slots = torch.tensor([5, 3, 8, 1, 7, 2, 9, 4, 6, 5, 1, 2, 3, 4, 8, 9] * 3), np.arange(48, dtype=np.int32)
    said = [torch.cat([slice.logits(slice.forward(Step.of_text(tokens[at : at + rows], slots[: at + rows], at)))
                       for at in range(0, 48, rows)]) for rows in (1, 2, 3, 4, 5, 7, 8, 11, 16, 32, 35, 48)]
    return all(torch.equal(one, said[0]) for one in said)


def really(models: Models, method: str, on: Cluster, params: SamplingParams, *, prompt: tuple[int, ...] = PROMPT,
           eos: int | None = None, source: Any = None, vocab: int = tiny.VOCAB) -> tuple[list[Event], RequestStats]:
    """The run itself: every stage and the draft compute."""
    events: list[Event] = []
    draft = source or DraftModel(models.draft, vocab=vocab)
    pipeline = InProcessPipeline(models.stages, None if method == "pp" else draft, costs=on, links=on.links,
                                 message_bytes=on.message_bytes, device_of=on.device_of)
    engine = Engine(pipeline, policy(method), listeners=[events.append])
    engine.submit(Request(0, prompt, params, frozenset() if eos is None else frozenset([eos])))
    counted = engine.stats.of(0)
    while engine.busy:
        engine.step()
    stats = replace(counted)
    engine.drain()
    return events, stats


def policy(method: str) -> Any:
    return make_method(method, **options_of(method, width=WIDTH, depth=3))


def answer_of(events: list[Event], prompt: tuple[int, ...] = PROMPT) -> Answer:
    tokens = [event.token for event in events if isinstance(event, Emitted)]
    (end,) = [event for event in events if isinstance(event, Finished)]
    return Answer("set/1#0", "set", list(prompt), tokens, end.reason)


def told(events: list[Event]) -> list[tuple[Any, ...]]:
    """All that an event says, but what a stage answers to rows off the true path, which a replay does not know."""
    lines: list[tuple[Any, ...]] = []
    for event in events:
        match event:
            case Launched(time, flight, nodes, parents, tokens, positions):
                lines.append(("launched", time, flight, nodes, parents, tokens, positions))
            case Landed(time, flight, nodes, _, _, legs):
                lines.append(("landed", time, flight, nodes, legs))
            case Drafted(time, job, expansions, leg):
                lines.append(("drafted", time, job, expansions, leg))
            case Emitted(time, _, node, token, position, hit):
                lines.append(("emitted", time, node, token, position, hit))
            case Died(time, _, nodes):
                lines.append(("died", time, nodes))
            case Finished(time, _, reason):
                lines.append(("finished", time, reason))
            case Ready(time):
                lines.append(("ready", time))
    return lines


def assert_same(one: list[Event], other: list[Event]) -> None:
    """Says where they part."""
    for index, (mine, theirs) in enumerate(zip(told(one), told(other))):
        assert mine == theirs, f"event {index}"
    assert len(one) == len(other)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("on", ["unit", "links", "shared"])
def test_a_replay_is_the_run_event_by_event(models: Models, on: str, temperature: float) -> None:
    """All methods, with one memo: what one of them asked about serves the others."""
    params = SamplingParams(max_tokens=TOKENS, temperature=temperature, seed=11)
    plain, _ = really(models, "pp", cluster(on), params)
    answer = answer_of(plain)
    assert len(answer.tokens) == TOKENS and len(set(answer.tokens)) > 4
    memo = Memo(models.memo, answer.prompt, answer.tokens, params, tiny.VOCAB)
    hits = 0
    for method in METHODS:
        events, stats = really(models, method, cluster(on), params)
        heard: list[Event] = []
        source = None if method == "pp" else MemoDraft(memo)
        run = replay(answer, params, source, policy(method), cluster(on), listeners=(heard.append,))
        assert_same(events, heard)
        assert run.stats == stats
        hits += stats.hits
    assert hits > TOKENS / 2


@pytest.mark.parametrize("method", ["chain", "fullpipe"])
def test_a_text_that_ended_by_itself(models: Models, method: str) -> None:
    """What the method guessed beyond the end, not knowing of it, is guessed in the replay too."""
    params = SamplingParams(max_tokens=TOKENS)
    text = answer_of(really(models, "pp", cluster("links"), params)[0]).tokens
    eos = next(token for token in text[6:] if token not in text[:6])
    events, stats = really(models, method, cluster("links"), params, eos=eos)
    answer = answer_of(events)
    assert answer.finish == "stop" and len(answer.tokens) < TOKENS
    heard: list[Event] = []
    memo = Memo(models.memo, answer.prompt, answer.tokens, params, tiny.VOCAB)
    run = replay(answer, params, MemoDraft(memo), policy(method), cluster("links"), listeners=(heard.append,))
    assert_same(events, heard)
    assert run.stats == stats


def test_a_draft_of_model_and_ngram(models: Models) -> None:
    """Chains from n-gram put nodes into the draft that nobody asked about."""
    params = SamplingParams(max_tokens=TOKENS)
    prompt = PROMPT * 2
    mixed = Mix([DraftModel(models.draft, vocab=tiny.VOCAB), NgramDraft(min_n=1)])
    events, stats = really(models, "fullpipe", cluster("links"), params, prompt=prompt, source=mixed)
    answer = answer_of(events, prompt)
    heard: list[Event] = []
    memo = Memo(models.memo, answer.prompt, answer.tokens, params, tiny.VOCAB)
    run = replay(answer, params, Mix([MemoDraft(memo), NgramDraft(min_n=1)]), policy("fullpipe"), cluster("links"),
                 listeners=(heard.append,))
    assert_same(events, heard)
    assert run.stats == stats


# ---- the memo --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(folders: tuple[Path, Path]) -> tuple[Models, Answer, SamplingParams]:
    models = load(*folders, dtype="bfloat16", cuts=(0, 1, 2, 4, tiny.LAYERS))
    params = SamplingParams(max_tokens=TOKENS, temperature=0.7, seed=3)
    return models, answer_of(really(models, "pp", cluster("unit"), params)[0]), params


def asked(memo: Memo, answer: Answer, params: SamplingParams) -> list[Any]:
    heard: list[Event] = []
    replay(answer, params, MemoDraft(memo), make_method("fullpipe", width=16), cluster("unit"),
           listeners=(heard.append,))
    return told(heard)


def test_what_was_kept_needs_no_model(case: tuple[Models, Answer, SamplingParams], tmp_path: Path) -> None:
    models, answer, params = case
    memo = Memo(models.memo, answer.prompt, answer.tokens, params, tiny.VOCAB)
    first = asked(memo, answer, params)
    memo.save(tmp_path / "deep" / "kept.npz")
    again = Memo(None, answer.prompt, answer.tokens, params, tiny.VOCAB)
    again.load(tmp_path / "deep" / "kept.npz")
    assert asked(again, answer, params) == first
    assert again.computed_rows == 0 < memo.computed_rows
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["kept.npz"]


def test_what_was_kept_is_added_to(case: tuple[Models, Answer, SamplingParams], tmp_path: Path) -> None:
    """In another order, too: ids are of one memo alone."""
    models, answer, params = case
    one = Memo(models.memo, answer.prompt, answer.tokens, params, tiny.VOCAB)
    asked(one, answer, params)
    one.save(tmp_path / "kept.npz")
    other = Memo(models.memo, answer.prompt, answer.tokens, params, tiny.VOCAB)
    path = other.child(other.child(0, 90), 91)
    said = other.answers([path])
    other.load(tmp_path / "kept.npz")
    other.save(tmp_path / "kept.npz")
    last = Memo(None, answer.prompt, answer.tokens, params, tiny.VOCAB)
    last.load(tmp_path / "kept.npz")
    assert last.answers([last.child(last.child(0, 90), 91)]) == said
    assert asked(last, answer, params) == asked(one, answer, params)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"text"])
def test_a_damaged_file_is_computed_again(case: tuple[Models, Answer, SamplingParams], tmp_path: Path,
                                          content: bytes) -> None:
    models, answer, params = case
    (tmp_path / "kept.npz").write_bytes(content)
    memo = Memo(models.memo, answer.prompt, answer.tokens, params, tiny.VOCAB)
    memo.load(tmp_path / "kept.npz")
    memo.answers([0])
    assert memo.computed_rows == len(answer.prompt) + TOKENS


def test_a_pool_that_overflows_changes_no_answer(case: tuple[Models, Answer, SamplingParams]) -> None:
    models, answer, params = case
    roomy, tight = (Memo(models.memo, answer.prompt, answer.tokens, params, tiny.VOCAB, **pool)
                    for pool in ({}, {"pool": TOKENS + 1}))
    assert asked(roomy, answer, params) == asked(tight, answer, params)
    assert tight.computed_rows > roomy.computed_rows


def test_a_path_is_computed_once_as_an_ancestor_and_once_for_its_answer(
        case: tuple[Models, Answer, SamplingParams]) -> None:
    """Then it stands in a higher slot than what is computed next below it."""
    models, answer, params = case
    memo = Memo(models.memo, answer.prompt, answer.tokens, params, tiny.VOCAB)
    above = memo.child(memo.true[3], 90)
    memo.answers([memo.child(above, 91)])
    memo.answers([above])
    late = memo.answers([memo.child(above, 92)])
    fresh = Memo(models.memo, answer.prompt, answer.tokens, params, tiny.VOCAB)
    assert fresh.answers([fresh.child(fresh.child(fresh.true[3], 90), 92)]) == late


def test_answers_have_the_candidates_of_a_draft_job(case: tuple[Models, Answer, SamplingParams]) -> None:
    models, answer, params = case
    ((tokens, logprobs),) = Memo(models.memo, answer.prompt, answer.tokens, params, tiny.VOCAB).answers([0])
    assert len(tokens) == len(set(tokens)) == TOP_K
    assert logprobs == sorted(logprobs, reverse=True) and logprobs[0] < 0


# ---- what a replay refuses, and what it measures -----------------------------------------------------------


def test_costs_that_would_have_to_be_measured() -> None:
    text = unit_cluster(2).text.replace("stage_ms = [[1, 1.0]]", "speed = 2.0")
    answer = Answer("a#0", "a", [1, 2], [3, 4], "length")
    with pytest.raises(UsageError, match="runs no stages") as caught:
        replay(answer, SamplingParams(max_tokens=2), None, make_method("pp"), Cluster.parse(text, "here", Path()))
    assert "fullpipe profile" in str(caught.value)


def test_pp_on_unit_steps_is_counted_by_hand() -> None:
    """Each token passes all stages, one after another: every stage is idle three quarters of the time."""
    answer = Answer("a#0", "a", [1, 2, 3], [4, 5, 6, 7, 8], "length")
    run = replay(answer, SamplingParams(max_tokens=5), None, make_method("pp"), unit_cluster(4))
    assert run.stats.tbt_s == pytest.approx(4e-3) and run.stats.steps == pytest.approx(20)
    assert run.meter.rows == {f"stage {k}": 7 for k in range(4)}  # three of the prompt, four of the answer
    assert run.meter.flights == {f"stage {k}": 5 for k in range(4)}
    assert [run.meter.busy[f"stage {k}"] for k in range(4)] == pytest.approx([5e-3] * 4)
    assert (run.meter.asked, run.meter.hits) == ([4], [0])
    assert 0 < run.engine_s < run.wall_s


def test_flights_that_have_not_landed_at_the_end_were_work_too(case: tuple[Models, Answer, SamplingParams]) -> None:
    """A text that ended by itself leaves the pipeline full."""
    models, answer, params = case
    answer = replace(answer, tokens=answer.tokens[:12], finish="stop")
    memo = Memo(models.memo, answer.prompt, answer.tokens, params, tiny.VOCAB)
    heard: list[Event] = []
    run = replay(answer, params, MemoDraft(memo), policy("fullpipe"), cluster("unit"), listeners=(heard.append,))
    end = next(index for index, event in enumerate(heard) if isinstance(event, Finished))
    landed = sum(isinstance(event, Landed) for event in heard[:end])
    launched = sum(isinstance(event, Launched) for event in heard[:end])
    assert landed == run.meter.flights["stage 3"] < run.meter.flights["stage 0"] <= launched
    assert max(run.meter.busy.values()) <= run.stats.decode_seconds + 1e-9
    assert sum(run.meter.asked) == run.stats.hits + run.stats.misses == 11
    assert sum(run.meter.hits) == run.stats.hits


def test_work_on_the_prompt_is_not_decoding() -> None:
    """A prompt of three flights; with one stage the first two have landed when decoding begins."""
    answer = Answer("a#0", "a", [5] * 600, [1, 2, 3], "length")
    run = replay(answer, SamplingParams(max_tokens=3), None, make_method("pp"), unit_cluster(1))
    assert run.stats.decode_seconds == pytest.approx(3e-3) == run.meter.busy["stage 0"]
    assert run.meter.rows["stage 0"] == 602


def test_other_tokens_than_recorded_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer("a#0", "a", [1, 2], [3, 4], "length")

    def wrong(self: RecordedStage, flight: Flight, hidden: None) -> Landed:
        nodes = [node for part in flight.parts for node, wanted in zip(part.nodes, part.wants) if wanted]
        return Landed(0.0, flight.id, nodes, [9] * len(nodes))

    monkeypatch.setattr(RecordedStage, "run", wrong)
    with pytest.raises(AssertionError, match="a#0: the text differs"):
        replay(answer, SamplingParams(max_tokens=2), None, make_method("pp"), unit_cluster(1))


@pytest.mark.weights
def test_so_with_a_real_model() -> None:
    """SmolLM2 guesses what SmolLM2 says: nearly every guess is true, in bfloat16 and under noise too."""
    path = resolve("smollm2-135m")
    vocab = open_model(path).config.vocab_size
    models = load(path, path, dtype="bfloat16", cuts=(0, 10, 20, 30), vocab=vocab)
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=7)
    prompt = tuple(load_tokenizer(path).encode("Count from one to ten: one, two,"))
    on = unit_cluster(3)
    events, stats = really(models, "fullpipe", on, params, prompt=prompt, vocab=vocab)
    answer = answer_of(events, prompt)
    heard: list[Event] = []
    memo = Memo(models.memo, answer.prompt, answer.tokens, params, vocab)
    run = replay(answer, params, MemoDraft(memo), policy("fullpipe"), on, listeners=(heard.append,))
    assert_same(events, heard)
    assert run.stats == stats and stats.hits > 20
