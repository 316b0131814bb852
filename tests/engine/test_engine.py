"""The engine over scripted stations: any method, shape and timing emits the same text.

The slow, obvious version is `plain`: ask the truth for the next token, append, repeat.
"""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driving import TellingEngine
from fullpipe.engine import RequestStats
from fullpipe.errors import PipelineError, UsageError
from fullpipe.events import Emitted, Finished
from fullpipe.messages import Event
from fullpipe.methods import METHODS, make_method, options_of
from fullpipe.pipeline.durations import unit_costs
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.links import Link, Links
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage, hash_token

VOCAB, SEED = 50, 3
TRUTH = {"kind": "hash", "vocab": VOCAB, "seed": SEED}


def plain(prompt: tuple[int, ...], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(hash_token(tokens, VOCAB, SEED))
    return tokens[len(prompt) :]


def pipeline(stages: int, accuracy: float = 0.8, costs=unit_costs, link_s: float = 0.0) -> InProcessPipeline:
    return InProcessPipeline([ScriptedStage(k, stages, TRUTH) for k in range(stages)],
                             ScriptedDraft(TRUTH, accuracy=accuracy, coverage=min(1.0, accuracy + 0.15)),
                             costs=costs, links=Links.even(stages, Link(link_s)))


def run(engine: TellingEngine, *requests: Request) -> tuple[dict[int, list[int]], dict[int, RequestStats], list[Event]]:
    """Texts, figures and news of requests that come together."""
    for request in requests:
        engine.submit(request)
    texts: dict[int, list[int]] = {request.id: [] for request in requests}
    news: list[Event] = []
    while engine.busy:
        for event in engine.step():
            news.append(event)
            if isinstance(event, Emitted):
                texts[event.request].append(event.token)
        engine.check()
    return texts, engine.figures, news


def request(id: int = 0, prompt: tuple[int, ...] = (4, 8, 15), tokens: int = 40, **kwargs: object) -> Request:
    return Request(id, prompt, SamplingParams(max_tokens=tokens), **kwargs)


@given(method=st.sampled_from(sorted(METHODS)), stages=st.integers(1, 9), width=st.integers(1, 9),
       accuracy=st.sampled_from([0.0, 0.5, 0.9, 1.0]), chunk=st.integers(1, 8),
       prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), min_size=1, max_size=3),
       durations=st.lists(st.integers(1, 20), min_size=1, max_size=7), link=st.sampled_from([0.0, 0.3, 5.0]),
       spare=st.sampled_from([2, 5, 200]))
def test_every_method_shape_and_timing_emits_the_same_text(
        method: str, stages: int, width: int, accuracy: float, chunk: int, prompts: list[list[int]],
        durations: list[int], link: float, spare: int) -> None:
    cycle = itertools.cycle(durations)
    pipe = pipeline(stages, accuracy, lambda station, rows, measured, context: next(cycle) / 4 if rows else 0.0, link)
    engine = TellingEngine(pipe, make_method(method, **options_of(method, width=width)), prefill_chunk=chunk,
                           spare_slots=spare)
    requests = [request(k, tuple(prompt), tokens=5 + 9 * k) for k, prompt in enumerate(prompts)]
    texts, figures, news = run(engine, *requests)
    for req in requests:
        assert texts[req.id] == plain(req.prompt, req.params.max_tokens)
        positions = [event.position for event in news if isinstance(event, Emitted) and event.request == req.id]
        assert positions == list(range(len(req.prompt), len(req.prompt) + req.params.max_tokens))
        stats = figures[req.id]
        assert stats.num_emitted == req.params.max_tokens == stats.hits + stats.misses + 1
        assert 0 <= stats.fill(stages) <= 1


@pytest.mark.parametrize("stages", [1, 4, 8])
def test_plain_pipeline_takes_n_steps_per_token(stages: int) -> None:
    _, figures, _ = run(TellingEngine(pipeline(stages), make_method("pp")), request())
    stats = figures[0]
    assert stats.steps_per_token == stages and stats.tbt_s == stages
    assert stats.fill(stages) == pytest.approx(1 / stages)
    assert stats.wasted_rows == stats.hits == 0 and stats.mean_acceptance_length == 1


@pytest.mark.parametrize("method", ["pipedec", "fullpipe"])
def test_a_perfect_draft_gives_one_step_per_token_after_the_first(method: str) -> None:
    _, figures, _ = run(TellingEngine(pipeline(8, accuracy=1.0), make_method(method, width=4)), request(tokens=64))
    assert figures[0].steps == 8 + 63
    assert figures[0].hit_rate == 1


def test_a_chain_accepts_whole_chains_with_a_perfect_draft() -> None:
    _, figures, _ = run(TellingEngine(pipeline(4, accuracy=1.0), make_method("chain", depth=4)), request(tokens=31))
    stats = figures[0]
    # The first token, then per round 4 draft calls and 4 steps for 5 tokens; 6 rounds.
    assert stats.steps == 4 + 6 * (4 + 4)
    assert stats.launched_rows == 1 + 6 * 5


def test_fullpipe_saves_late_siblings_that_pipedec_flushes_for() -> None:
    steps = {}
    for method in ("pipedec", "fullpipe"):
        pipe = InProcessPipeline([ScriptedStage(k, 8, TRUTH) for k in range(8)],
                                 ScriptedDraft(TRUTH, accuracy=0.6, coverage=1.0))
        _, figures, _ = run(TellingEngine(pipe, make_method(method, width=4)), request(tokens=200))
        steps[method] = figures[0].steps_per_token
    assert steps["fullpipe"] < steps["pipedec"]


def test_end_tokens_stop_strings_and_aborts_end_a_request() -> None:
    text = plain((4, 8, 15), 40)
    for method in ("pp", "fullpipe"):
        engine = TellingEngine(pipeline(4), make_method(method))
        texts, _, news = run(engine, request(eos=frozenset({text[6]})))
        cut = text.index(text[6]) + 1
        assert texts[0] == text[:cut]
        assert [event.reason for event in news if isinstance(event, Finished)] == ["stop"]
        # A listener that has seen enough; the same pipeline serves the next request.
        def enough(event: Event, engine: TellingEngine = engine) -> None:
            if isinstance(event, Emitted) and event.request == 1 and event.token == text[3]:
                engine.end(1, "stop")

        engine.listen(enough)
        texts, figures, news = run(engine, request(id=1))
        assert texts[1] == text[: text.index(text[3]) + 1]
        assert [event.reason for event in news if isinstance(event, Finished)] == ["stop"]
        assert figures[1].num_emitted == len(texts[1]) == figures[1].hits + figures[1].misses
        engine.submit(request(id=2))
        engine.step()
        engine.end(2)
        engine.end(99)
        engine.check()
        assert not engine.busy


def test_a_method_that_needs_a_draft_says_so() -> None:
    pipe = InProcessPipeline([ScriptedStage(0, 1, TRUTH)])
    with pytest.raises(UsageError, match="needs a draft"):
        TellingEngine(pipe, make_method("fullpipe"))
    texts, _, _ = run(TellingEngine(pipe, make_method("pp")), request(tokens=5))
    assert texts[0] == plain((4, 8, 15), 5)


def test_a_listener_that_raises_is_dropped_and_the_run_goes_on() -> None:
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise RuntimeError("full disk")

    engine = TellingEngine(pipeline(2), make_method("fullpipe"), listeners=[broken, heard.append])
    texts, _, _ = run(engine, request(tokens=10))
    assert texts[0] == plain((4, 8, 15), 10)
    kinds = {type(event).__name__ for event in heard}
    assert kinds == {"Ready", "Submitted", "Admitted", "Launched", "Asked", "Landed", "Drafted", "Emitted", "Died",
                     "Finished"}


def test_the_policy_changes_between_requests_on_the_same_stations() -> None:
    engine = TellingEngine(pipeline(4), make_method("pp"))
    for id, method in enumerate(("pipedec", "pp", "fullpipe", "chain")):
        engine.use(make_method(method))
        texts, figures, _ = run(engine, request(id=id))
        assert texts[id] == plain((4, 8, 15), 40)
        if method == "pp":
            assert figures[id].steps_per_token == 4, "what the last request left behind takes no time"
    engine.drain()


@pytest.mark.parametrize("other", [None, "chain"])
def test_a_pipeline_without_the_draft_that_a_method_needs_changes_nothing(other: str | None) -> None:
    first, method = pipeline(2), make_method("fullpipe")
    engine = TellingEngine(first, method)
    engine.submit(request())
    for _ in range(5):
        engine.step()
    with pytest.raises(UsageError, match="needs a draft"):
        engine.attach(InProcessPipeline([ScriptedStage(0, 1, TRUTH)]), make_method(other) if other else None)
    assert engine.pipeline is first and engine.method is method and engine.num_running == 1
    while engine.busy:
        engine.step()
    assert engine.stats.totals.emitted == 40


def test_cancelled_rows_are_not_computed_by_the_stages_ahead_of_them() -> None:
    rows: dict[str, int] = {}

    def count(station: str, number: int, measured: float, context: int) -> float:
        rows[station] = rows.get(station, 0) + number
        return unit_costs(station, number, measured, context)

    run(TellingEngine(pipeline(8, accuracy=0.5, costs=count), make_method("fullpipe")), request(tokens=80))
    computed = [rows[f"stage {k}"] for k in range(8)]
    assert computed == sorted(computed, reverse=True) and computed[-1] < 0.6 * computed[0]


def test_after_an_exception_in_the_middle_of_a_step_the_engine_takes_nothing_more() -> None:
    class Unlucky(ScriptedStage):
        def run(self, flight, hidden):  # type: ignore[no-untyped-def]
            if flight.id == 3:
                raise KeyboardInterrupt
            return super().run(flight, hidden)

    engine = TellingEngine(InProcessPipeline([Unlucky(0, 1, TRUTH)]), make_method("pp"))
    with pytest.raises(KeyboardInterrupt):
        run(engine, request())
    engine.end(0)
    for use in (engine.drain, lambda: engine.submit(request(id=1)), lambda: engine.use(make_method("pp"))):
        with pytest.raises(PipelineError, match=r"cannot go on\nAttach another one"):
            use()


def test_draining_under_a_running_request_is_refused() -> None:
    engine = TellingEngine(pipeline(2), make_method("pp"))
    engine.submit(request())
    with pytest.raises(UsageError, match="another request is running"):
        engine.drain()


def test_fill_does_not_count_what_came_before_the_first_launch() -> None:
    _, figures, _ = run(TellingEngine(pipeline(8), make_method("pp"), prefill_chunk=4),
                        request(prompt=tuple(range(50)), tokens=10))
    stats = figures[0]
    # The last chunks are still in the stages when the root enters: 7 + 6 + ... + 1 stage steps beside its own.
    assert stats.fill(8) == pytest.approx((8 * 10 + 28) / (8 * 80))
