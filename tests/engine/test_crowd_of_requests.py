"""Many requests in one engine: each gets the text that it would get alone, whoever shares the pipeline and whatever the
memory allows; nobody starves, and nothing is lost."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driving import TellingEngine
from fullpipe.costs import CostCurve, Machine
from fullpipe.errors import PipelineError, PromptError, StationFailed, UsageError
from fullpipe.events import Emitted, Finished, Launched
from fullpipe.messages import Event, Flight
from fullpipe.methods import Method, make_method, options_of
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.sequences.sequence import Sequence
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage, hash_token

VOCAB, SEED = 50, 3
TRUTH = {"kind": "hash", "vocab": VOCAB, "seed": SEED}
FLAT = CostCurve.of(lambda rows: 1 + 0.001 * rows)
STEEP = CostCurve.of(lambda rows: float(rows))  # a row costs as much as a flight

ROOF = CostCurve.of(lambda rows: max(8.0, rows))  # eight rows for the price of one


def plain(prompt: tuple[int, ...], count: int, context: int = 3) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(hash_token(tokens, VOCAB, SEED, context))
    return tokens[len(prompt):]


def pipeline(stages: int, curve: CostCurve = FLAT, accuracy: float = 0.8,
             truth: dict[str, object] = TRUTH) -> InProcessPipeline:
    return InProcessPipeline([ScriptedStage(k, stages, truth) for k in range(stages)],
                             ScriptedDraft(truth, accuracy=accuracy, coverage=min(1.0, accuracy + 0.15)),
                             costs=lambda station, rows, measured, context: curve(rows))


def method_of(name: str, stages: int, curve: CostCurve | None = FLAT, width: int | None = None) -> Method:
    """The method, told what rows cost; None: it is told nothing."""
    return make_method(name, **options_of(name, width=width), machine=Machine(stages, curve, curve) if curve else None)


def run(engine: TellingEngine, requests: list[Request]) -> tuple[dict[int, Sequence], dict[int, list[int]], float]:
    """Submit at once; tracks, texts, and when the last token came."""
    tracks = {request.id: engine.submit(request) for request in requests}
    texts: dict[int, list[int]] = {request.id: [] for request in requests}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Emitted):
                texts.setdefault(event.request, []).append(event.token)
        engine.check()
    return tracks, texts, max(engine.figures[id].last_token or 0.0 for id in tracks)


def request(id: int, prompt: tuple[int, ...], tokens: int, **kwargs: object) -> Request:
    return Request(id, prompt, SamplingParams(max_tokens=tokens), **kwargs)  # type: ignore[arg-type]


def crowd(count: int, tokens: int = 24) -> list[Request]:
    return [request(k, (k % 7 + 1, 8, k), tokens) for k in range(count)]


@given(curve=st.sampled_from([None, FLAT, STEEP]), stages=st.integers(1, 5),
       method=st.sampled_from(["pp", "pipedec", "fullpipe"]), width=st.sampled_from([None, 4]),
       prompts=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=60), min_size=1, max_size=7),
       beginning=st.integers(0, 40), slots=st.sampled_from([None, 700, 1100]), seats=st.sampled_from([None, 1, 3]),
       share=st.booleans(), chunk=st.integers(1, 40), block=st.sampled_from([1, 8, 50, 256]))
def test_every_request_gets_the_text_that_it_would_get_alone(
        curve: CostCurve | None, stages: int, method: str, width: int | None, prompts: list[list[int]],
        beginning: int, slots: int | None, seats: int | None, share: bool, chunk: int, block: int) -> None:
    requests = [request(k, (*range(beginning), *prompt), 5 + 40 * k) for k, prompt in enumerate(prompts)]
    engine = TellingEngine(pipeline(stages, curve or FLAT), method_of(method, stages, curve, width),
                           prefill_chunk=chunk, max_num_seqs=seats, spare_slots=40, kv_cache_tokens=slots,
                           block_size=block, enable_prefix_caching=share and slots is not None)
    _, texts, _ = run(engine, requests)
    for one in requests:
        assert texts[one.id] == plain(one.prompt, one.params.max_tokens)
    engine.drain()
    assert engine.memory.used == 0, "all memory came back"


@given(stages=st.integers(1, 4), method=st.sampled_from(["pp", "fullpipe", "pipedec", "static-tree", "chain"]),
       curve=st.sampled_from([FLAT, STEEP, ROOF]), accuracy=st.sampled_from([0.3, 0.8, 0.95]),
       slots=st.sampled_from([500, 700, 1100, 3000]), block=st.sampled_from([1, 8, 16, 50, 64]),
       seats=st.sampled_from([None, 2, 4]), chunk=st.sampled_from([3, 16, 256]), luck=st.integers(0, 10**6))
def test_who_shares_with_one_that_is_aborted_says_what_it_would_say_alone(
        stages: int, method: str, curve: CostCurve, accuracy: float, slots: int, block: int, seats: int | None,
        chunk: int, luck: int) -> None:
    """Requests go on from others' texts, which may end at any moment; an answer depends on the whole path."""
    rng = random.Random(luck)
    engine = TellingEngine(pipeline(stages, curve, accuracy, {**TRUTH, "kind": "path"}),
                           method_of(method, stages, curve), prefill_chunk=chunk, max_num_seqs=seats, spare_slots=40,
                           kv_cache_tokens=slots, block_size=block, enable_prefix_caching=True)
    sequences: list[Sequence] = []
    while len(sequences) < 6 or engine.busy:
        if len(sequences) < 6 and (rng.random() < 0.1 or not engine.busy):
            before = tuple(rng.choice(sequences).tokens)[: rng.randint(1, 150)] if sequences else tuple(range(40))
            prompt = (*before, *rng.choices(range(VOCAB), k=rng.randint(1, 3)))
            sequences.append(engine.submit(request(len(sequences), prompt, rng.randint(1, 60))))
        if engine.busy:
            engine.step()
            engine.check()
        if sequences and rng.random() < 0.03:
            engine.end(rng.randrange(len(sequences)))
    for one in sequences:
        assert one.output == plain(one.request.prompt, len(one.output), 10**6)
        assert one.finished == "abort" or len(one.output) == one.request.params.max_tokens
    engine.drain()
    assert engine.memory.used == 0


def test_who_does_not_fit_into_a_smaller_cache_is_known(caplog: pytest.LogCaptureFixture) -> None:
    """A pipeline that was made anew may have less memory: who attaches it ends what can never run."""
    def smaller(slots: int) -> InProcessPipeline:
        made = pipeline(2)
        made.cache_slots = slots
        return made

    engine = TellingEngine(smaller(2000), make_method("pp"), spare_slots=8, block_size=50, kv_cache_tokens=1000)
    large, small = engine.submit(request(0, (1, 2), 600)), engine.submit(request(1, (1, 2), 20))
    engine.step()
    with pytest.raises(UsageError, match="40 cache slots are less than a block of 50"):
        engine.attach(smaller(40))
    engine.step()
    engine.attach(smaller(400))
    assert engine.memory.total == 400 and "1000 cache slots were asked for" in caplog.text
    with pytest.raises(PromptError, match="need 610 cache slots, and there are 400"):
        engine.check_fits(large.request)
    engine.end(0)
    while engine.busy:
        engine.step()
    assert small.output == plain((1, 2), 20)


def test_a_long_talk_holds_few_blocks_more_than_it_fills() -> None:
    engine = TellingEngine(pipeline(2), make_method("fullpipe"), kv_cache_tokens=10 * 256, enable_prefix_caching=True)
    text: tuple[int, ...] = tuple(range(30))
    for turn in range(20):
        last = engine.submit(request(turn, text, 40))
        while engine.busy:
            engine.step()
        engine.check()
        text = (*last.tokens, 7, 8)
        assert turn == 0 or last.cached > 0
        assert len(last.slots.blocks) <= len(text) // 256 + 4
    assert text[:-2] == tuple(last.tokens) and engine.stats.totals.preemptions == 0


def test_memory_that_runs_out_sends_the_youngest_back_and_nothing_is_lost() -> None:
    requests = [request(k, tuple(range(k, k + 100)), 600) for k in range(3)]
    engine = TellingEngine(pipeline(3), make_method("fullpipe"), spare_slots=64, kv_cache_tokens=1300,
                           block_size=64)
    _tracks, texts, _ = run(engine, requests)
    assert engine.stats.totals.preemptions > 0
    assert all(texts[one.id] == plain(one.prompt, 600) for one in requests)
    ends = [engine.figures[one.id].last_token or 0.0 for one in requests]
    assert ends == sorted(ends), "the oldest is never sent back"


def test_who_can_never_fit_is_refused_and_the_others_go_on() -> None:
    engine = TellingEngine(pipeline(2), make_method("pp"), spare_slots=8, kv_cache_tokens=300, block_size=50)
    engine.submit(request(0, (1, 2), 20))
    with pytest.raises(PromptError, match="need 408 cache slots, and there are 300"):
        engine.submit(request(1, tuple(range(100)), 300))
    while engine.busy:
        engine.step()
    engine.check()


def test_a_next_turn_takes_the_conversations_rows_over() -> None:
    engine = TellingEngine(pipeline(3), make_method("fullpipe"), kv_cache_tokens=4000, enable_prefix_caching=True)
    first = request(0, tuple(range(40)), 30)
    tracks, texts, _ = run(engine, [first])
    assert tracks[0].cached == 0
    turn = request(1, (*first.prompt, *texts[0], 7, 7, 7), 30)
    tracks, texts, _ = run(engine, [turn])
    assert tracks[1].cached >= 40 + 20
    assert texts[1] == plain(turn.prompt, 30)


def test_requests_that_run_share_what_they_begin_with() -> None:
    engine = TellingEngine(pipeline(3), make_method("fullpipe"), kv_cache_tokens=9000, enable_prefix_caching=True,
                           prefill_chunk=16)
    engine.submit(request(0, tuple(range(48)), 60))
    while engine.figures[0].num_emitted < 5:
        engine.step()
    tracks, texts, _ = run(engine, [request(k, (*range(48), k), 20) for k in range(1, 4)])
    assert [track.cached for track in tracks.values()] == [48, 48, 48]
    assert all(texts[k] == plain((*range(48), k), 20) for k in tracks)


def test_requests_that_come_together_compute_what_they_begin_with_once() -> None:
    """All but the first wait until its prompt is on its way; one that begins otherwise does not."""
    engine = TellingEngine(pipeline(3), make_method("fullpipe"), kv_cache_tokens=20000, enable_prefix_caching=True,
                           prefill_chunk=64)
    long = tuple(k % 40 for k in range(500))
    tracks, texts, _ = run(engine, [request(k, (*long, k), 8) for k in range(4)] + [request(4, (1, 2, 3), 8)])
    assert [tracks[k].cached for k in range(5)] == [0, 448, 448, 448, 0], "but for what is not worth waiting for"
    assert all(texts[k] == plain(tracks[k].request.prompt, 8) for k in tracks)


@pytest.mark.parametrize("short", [True, False], ids=["ends at once", "aborted"])
def test_an_arena_that_the_draft_never_opened_gives_the_draft_nothing(short: bool) -> None:
    """A request that shares a prefix ends while a slow job keeps the draft from hearing of it; its arena is kept."""
    slow = False
    stages = [ScriptedStage(k, 2, TRUTH) for k in range(2)]
    engine = TellingEngine(InProcessPipeline(stages, ScriptedDraft(TRUTH), costs=lambda station, *_: 60.0 if slow and
                                      station == "draft" else 1.0),
                    make_method("fullpipe"), kv_cache_tokens=9000, enable_prefix_caching=True)
    prompt, longer = tuple(range(48)), (*range(48), *range(10, 40))
    engine.submit(request(0, prompt, 400))
    while engine.figures[0].num_emitted < 5:
        engine.step()
    slow = True
    for _ in range(6):
        engine.step()
    second = engine.submit(request(1, longer, 1 if short else 100))
    while not second.finished:
        engine.step()
        if engine.figures[1].num_emitted:
            engine.end(1)
    assert second.draft.rows and not second.draft.opened, "the case that is meant"
    slow = False
    third = engine.submit(request(2, longer, 100))
    while not third.finished:
        engine.step()
    assert third.tokens[len(longer):] == plain(longer, 100)


class Falling(ScriptedStage):
    """A last stage that fails at its flights of these numbers."""

    def __init__(self, index: int, stages: int, at: tuple[int, ...]) -> None:
        super().__init__(index, stages, TRUTH)
        self.at, self.count = at, 0

    def run(self, flight: Flight, hidden: object) -> object:
        self.count += 1
        if self.count in self.at:
            raise StationFailed(f"stage {self.index}", "it fell over")
        return super().run(flight, hidden)  # type: ignore[arg-type]


@given(method=st.sampled_from(["pp", "pipedec", "fullpipe"]), falls=st.lists(st.integers(1, 60), max_size=4),
       slots=st.sampled_from([None, 700]), share=st.booleans(), count=st.integers(1, 5))
def test_an_engine_goes_on_with_another_pipeline_whenever_one_fails(
        method: str, falls: list[int], slots: int | None, share: bool, count: int) -> None:
    def another(fall: tuple[int, ...]) -> InProcessPipeline:
        return InProcessPipeline([ScriptedStage(0, 3, TRUTH), ScriptedStage(1, 3, TRUTH), Falling(2, 3, fall)],
                                 ScriptedDraft(TRUTH, accuracy=0.8))

    requests, left = crowd(count, tokens=40), [(fall,) for fall in falls]
    engine = TellingEngine(another(left.pop() if left else ()), make_method(method), kv_cache_tokens=slots,
                           block_size=50, enable_prefix_caching=share and slots is not None)
    sequences = [engine.submit(one) for one in requests]
    drained = False
    while not drained:
        try:
            while engine.busy:
                engine.step()
                engine.check()
            engine.drain()
            drained = True
        except StationFailed:
            with pytest.raises(PipelineError):
                engine.drain()
            engine.attach(another(left.pop() if left else ()))
            engine.check()
    for one in sequences:
        assert one.output == plain(one.request.prompt, 40) and one.finished == "length"
        assert engine.figures[one.request.id].num_emitted == 40
    assert engine.memory.used == 0


def test_one_on_trial_runs_alone_until_it_is_over() -> None:
    engine = TellingEngine(pipeline(3), make_method("fullpipe"))
    sequences = [engine.submit(one) for one in crowd(4, tokens=20)]
    for _ in range(10):
        engine.step()
    engine.isolate(2)
    engine.attach(pipeline(3))
    while not sequences[2].finished:
        engine.step()
        assert engine.num_running <= 1
    assert sequences[2].output == plain(sequences[2].request.prompt, 20)
    engine.isolate(None)
    while engine.busy:
        engine.step()
    assert all(one.output == plain(one.request.prompt, 20) for one in sequences)


class Watch:
    """How many guesses were launched, and how many of them before anybody had ended."""

    def __init__(self) -> None:
        self.guesses = self.at_first = 0
        self.ended = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, Launched):
            number = sum(parent >= 0 for parent in event.parents)
            self.guesses += number
            self.at_first += 0 if self.ended else number
        self.ended |= isinstance(event, Finished)


def test_with_enough_requests_and_dear_rows_nobody_guesses() -> None:
    """Rows cost as much as flights: with two requests per stage each flight is full of what is certain."""
    watch = Watch()
    engine = TellingEngine(pipeline(4, STEEP), method_of("fullpipe", 4, STEEP), listeners=[watch])
    run(engine, crowd(16))
    assert watch.at_first == 0


def test_one_request_alone_gets_guesses_and_so_do_many_where_rows_are_free() -> None:
    for count in (1, 16):
        watch = Watch()
        engine = TellingEngine(pipeline(4), method_of("fullpipe", 4), listeners=[watch])
        run(engine, crowd(count))
        assert watch.guesses > 24 * count


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("curve", [FLAT, STEEP, ROOF], ids=["flat", "steep", "roof"])
def test_throughput_never_falls_below_plain_pipelining_of_the_same_requests(count: int, curve: CostCurve) -> None:
    ends = []
    for method, known in (("fullpipe", curve), ("pp", curve), ("pp", None)):
        engine = TellingEngine(pipeline(4, curve), method_of(method, 4, known))
        ends.append(run(engine, crowd(count))[2])
    assert ends[0] <= min(ends[1:]) * 1.05  # the last flights of a crowd are few


def test_a_root_that_has_its_slot_goes_when_guesses_have_taken_all_others() -> None:
    """Where rows cost nothing a quick draft looks at nodes until no slot is left, the next root among them."""
    free = CostCurve({1: 1.0})
    quick = InProcessPipeline([ScriptedStage(k, 2, TRUTH) for k in range(2)],
                              ScriptedDraft(TRUTH, accuracy=0.5, coverage=0.5),
                              costs=lambda station, *_: {"draft": 0.01, "stage 0": 1.5}.get(station, 1.0))
    engine = TellingEngine(quick, make_method("fullpipe", machine=Machine(2, free)))
    _, texts, _ = run(engine, crowd(1, tokens=60))
    assert texts[0] == plain((1, 8, 0), 60)


def test_nobody_starves_however_bad_his_guesses_are() -> None:
    """Between two tokens of any request no more time passes than three traversals of full flights."""
    seen: dict[int, list[float]] = {}

    def listen(event: Event) -> None:
        if isinstance(event, Emitted):
            seen.setdefault(event.request, []).append(event.time)

    curve = CostCurve.of(lambda rows: 1 + 0.01 * rows)
    engine = TellingEngine(pipeline(4, curve, accuracy=0.3), make_method("fullpipe", machine=Machine(4, curve)),
                           listeners=[listen])
    run(engine, crowd(12))
    gaps = [after - before for times in seen.values() for before, after in itertools.pairwise(times)]
    assert max(gaps) <= 3 * 4 * curve(16)


def test_waiting_makes_up_for_a_bad_priority() -> None:
    engine = TellingEngine(pipeline(2), make_method("pp"), max_num_seqs=1)
    patient = engine.submit(request(0, (1,), 2, priority=3))  # it comes first and runs at once
    behind = engine.submit(request(1, (1,), 2, priority=3))
    rushing, begun = 2, []
    while not (patient.finished and behind.finished):
        if len(engine.unfinished()) < 3:
            begun.append(engine.submit(request(rushing, (1, 2), 2, priority=0)))
            rushing += 1
        engine.step()
    assert len(begun) > 3, "those of better priority went first for a while"


def test_no_priority_is_so_good_that_others_wait_for_ever() -> None:
    engine = TellingEngine(pipeline(2), make_method("pp"), max_num_seqs=1)
    engine.submit(request(0, (1,), 2, priority=-(2**31)))
    patient, rushing = engine.submit(request(1, (1,), 2)), 2
    while not patient.finished:
        assert rushing < 3000
        if len(engine.unfinished()) < 3:
            engine.submit(request(rushing, (1, 2), 2, priority=-(2**31)))
            rushing += 1
        engine.step()


def test_a_deadline_ends_a_request_with_what_it_has() -> None:
    engine = TellingEngine(pipeline(2), make_method("fullpipe"))
    late = engine.submit(request(0, (1, 2), 500, deadline=30.0))
    other = engine.submit(request(1, (1, 2), 60))
    reasons = {}
    while engine.busy:
        reasons |= {event.request: event.reason for event in engine.step() if isinstance(event, Finished)}
        engine.check()
    assert reasons == {0: "deadline", 1: "length"}
    assert late.output == plain((1, 2), len(late.output)) and 0 < len(late.output) < 500
    assert len(other.output) == 60


def test_a_prompt_holds_those_that_run_up_by_no_more_than_its_share() -> None:
    """While a prompt comes in tokens take at most twice as long."""
    curve, spans = CostCurve.of(lambda rows: 1 + 0.02 * rows), []

    def listen(event: Event) -> None:
        if isinstance(event, Emitted) and event.request == 0:
            spans.append(event.time)

    method = make_method("fullpipe", machine=Machine(2, curve), prefill_share=1.0)
    engine = TellingEngine(pipeline(2, curve, accuracy=0.0), method, listeners=[listen])
    engine.submit(request(0, (1, 2), 400))
    while engine.figures[0].num_emitted < 5:
        engine.step()
    before = max(after - start for start, after in itertools.pairwise(spans))
    spans.clear()
    engine.submit(request(1, tuple(range(2000)), 2))
    while engine.num_waiting or engine.num_running > 1:
        engine.step()
    assert max(after - start for start, after in itertools.pairwise(spans)) <= before * 2 + 1e-9
    engine.end(0)


def test_flights_tell_whose_prompt_rows_they_carry() -> None:
    told: Counter[int] = Counter()
    engine = TellingEngine(pipeline(2), make_method("pp"), prefill_chunk=5,
                    listeners=[lambda event: told.update(event.prompt_rows) if isinstance(event, Launched) else None])
    run(engine, [request(0, tuple(range(12)), 3), request(1, (7,), 3)])
    assert told == {0: 11}, "the last token of a prompt is a root"


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UsageError, match="prefill share must be above 0"):
        make_method("fullpipe", prefill_share=0.0, machine=Machine(2, FLAT))
    with pytest.raises(UsageError, match="bound of cache memory"):
        TellingEngine(pipeline(2), make_method("pp"), enable_prefix_caching=True)
    assert math.isinf(request(0, (1,), 1).deadline)
