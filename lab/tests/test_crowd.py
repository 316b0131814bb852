"""Many recorded answers at once: each request what it would be alone, arrivals by the clock, and all of it counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fullpipe.cluster.provenance import provenance
from fullpipe.engine import Engine, Listener
from fullpipe.errors import UsageError
from fullpipe.events import Emitted, Launched
from fullpipe.messages import ArenaId, Event, Expansion, Flight, Landed, Opening, Part
from fullpipe.methods import make_method
from fullpipe.pipeline.base import Pipeline
from fullpipe.request import SamplingParams
from fullpipe_lab.clusters import Cluster, unit_cluster
from fullpipe_lab.crowd import CrowdDraft, CrowdRun, MakeEngine, Spread, closed, play, poisson
from fullpipe_lab.files import Journal
from fullpipe_lab.recording import Answer
from fullpipe_lab.replay import RecordedStage, replay
from fullpipe_lab.studies.batching import (
    AT_ONCE,
    METHODS,
    RATES,
    Cell,
    Measured,
    all_cells,
    check_cluster,
    make_engine,
    order,
    write_report,
)

STAGES = 4
PARAMS = SamplingParams(max_tokens=12)
WRONG = 5  # tokens of a recording that this divides are never guessed first


class Guesser:
    """Guesses what the recording says, second best where a token is a multiple of `WRONG`; off the path nonsense.

    It tells a row's path by its token: the recordings here say every token once.
    """

    def __init__(self, answer: Answer) -> None:
        path = [answer.prompt[-1], *answer.tokens]
        self._next = dict(pairwise(path))

    def answer(self, part: Part, fanout: int) -> list[Expansion]:
        wanted = [row for row in range(len(part)) if part.wants[row]]
        return [self._guess(part.nodes[row], part.tokens[row]) for row in wanted]

    def _guess(self, node: int, token: int) -> Expansion:
        said = self._next.get(token, 1)
        tokens = [2, said] if said % WRONG == 0 else [said, 2]
        return Expansion(node, tokens, [-0.1, -2.4], [-1, -1])

    def run(self, job: Flight) -> list[Expansion]:
        return [one for part in job.parts for one in self.answer(part, job.fanout)]


def recorded(index: int, length: int = 12) -> Answer:
    first = 100 * (index + 1)
    return Answer(f"set/{index}#0", "set", [first - 3, first - 2, first - 1], list(range(first, first + length)),
                  "length" if length == PARAMS.max_tokens else "stop")


ANSWERS = [recorded(0), recorded(1, 7), recorded(2), recorded(3, 1), recorded(4, 9), recorded(5)]


def maker(method: str, listeners: Sequence[Any] = (), **options: Any) -> MakeEngine:
    return lambda pipeline, others: Engine(pipeline, make_method(method, **options), listeners=[*others, *listeners])


def crowd(method: str, schedule: Sequence[float | None], answers: Sequence[Answer] = ANSWERS,
          on: Cluster | None = None, listeners: Sequence[Any] = ()) -> CrowdRun:
    source = None if method == "pp" else CrowdDraft(lambda index: Guesser(answers[index]))
    return play(answers, schedule, PARAMS, source, on or unit_cluster(STAGES), maker(method, listeners))


# ---- texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pp", "chain", "pipedec", "fullpipe"])
@pytest.mark.parametrize("at_once", [1, 3, 6])
def test_every_request_is_answered_with_its_own_recording(method: str, at_once: int) -> None:
    """`play` compares the texts; what is left to see is that all are there, and that guesses were of use."""
    run = crowd(method, closed(len(ANSWERS), at_once))
    assert sorted(one.id for one in run.requests) == sorted(answer.id for answer in ANSWERS)
    assert run.tokens == sum(len(answer.tokens) for answer in ANSWERS)
    assert all(one.times == sorted(one.times) for one in run.requests)
    assert all(one.hits + one.misses == len(one.times) - 1 for one in run.requests)
    assert (sum(one.hits for one in run.requests) > run.tokens / 2) == (method != "pp")


@pytest.mark.parametrize("method", ["pp", "fullpipe"])
def test_one_after_another_each_is_the_replay_of_one(method: str) -> None:
    """A crowd of one at a time measures what `replay` measures."""
    run = crowd(method, closed(len(ANSWERS), 1))
    for answer, one in zip(ANSWERS, run.requests):
        source = None if method == "pp" else Guesser(answer)
        alone = replay(answer, PARAMS, source, make_method(method), unit_cluster(STAGES)).stats
        assert (one.hits, one.misses) == (alone.hits, alone.misses)
        assert one.tbt_s == (pytest.approx(alone.tbt_s) if len(answer.tokens) > 1 else None)
        assert one.times[-1] - one.times[0] == pytest.approx(alone.decode_seconds - STAGES * 1e-3)


def test_a_recording_may_be_asked_for_several_times_at_once() -> None:
    run = crowd("fullpipe", closed(4, 4), [ANSWERS[0]] * 4)
    assert [one.id for one in run.requests] == [ANSWERS[0].id] * 4


def test_the_same_crowd_twice_is_the_same() -> None:
    one, other = (crowd("fullpipe", poisson(6, 90.0, seed=3)) for _ in range(2))
    assert one.requests == other.requests and one.stations == other.stations and one.span_s == other.span_s


def test_another_text_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RecordedStage.run

    def run(self: RecordedStage, flight: Flight, hidden: None) -> Landed | None:
        landed = right(self, flight, hidden)
        if landed is not None:
            landed.tokens = [token + 1 for token in landed.tokens]
        return landed

    monkeypatch.setattr(RecordedStage, "run", run)
    with pytest.raises(AssertionError, match="the committed path is not the recorded one"):
        crowd("pp", closed(2, 2), ANSWERS[:2])


def test_another_length_and_another_end_are_noticed() -> None:
    """Of an engine that ends every text itself, after its first token."""
    def hasty(pipeline: Pipeline, listeners: Sequence[Listener]) -> Engine:
        engine = Engine(pipeline, make_method("pp"), listeners=[*listeners, lambda event: end(event)])

        def end(event: Event) -> None:
            if isinstance(event, Emitted):
                engine.end(event.request, "abort")

        return engine

    with pytest.raises(AssertionError, match="a#0: ended with 'abort', not 'stop'"):
        play([Answer("a#0", "a", [1, 2], [3], "stop")], [0.0], PARAMS, None, unit_cluster(1), hasty)
    with pytest.raises(AssertionError, match="a#0: the text differs"):
        play([Answer("a#0", "a", [1, 2], [3, 4], "length")], [0.0], PARAMS, None, unit_cluster(1), hasty)


def test_costs_that_would_have_to_be_measured() -> None:
    text = unit_cluster(2).text.replace("stage_ms = [[1, 1.0]]", "speed = 2.0")
    with pytest.raises(UsageError, match="runs no stages"):
        play(ANSWERS[:1], [0.0], PARAMS, None, Cluster.parse(text, "here", Path()), maker("pp"))


# ---- arrivals ----------------------------------------------------------------------------------------------


def test_a_closed_loop_has_its_number_of_requests_at_any_time() -> None:
    running: set[int] = set()
    most: list[int] = []

    def watch(event: Any) -> None:
        if isinstance(event, Emitted):
            running.add(event.request)
            most.append(len(running))
        elif type(event).__name__ == "Finished":
            running.discard(event.request)

    run = crowd("fullpipe", closed(6, 3), listeners=[watch])
    assert max(most) == 3
    ends = sorted(one.times[-1] for one in run.requests)
    assert [one.arrived for one in run.requests] == [0.0, 0.0, 0.0, *ends[:3]]


def test_requests_come_when_the_schedule_says_so_and_may_find_an_idle_pipeline() -> None:
    schedule = [0.5, 0.5005, 3.0]
    run = crowd("pp", schedule, ANSWERS[:3])
    assert [one.arrived for one in run.requests] == schedule
    step = 1e-3
    assert [one.ttft_s for one in run.requests] == pytest.approx([STAGES * step, 4.5 * step, STAGES * step])
    assert run.span_s == pytest.approx(2.5 + (4 + 4 * 11) * step)  # from the first one's coming to the last one's end


def test_poisson_arrivals_are_seeded_and_of_the_rate_that_was_asked_for() -> None:
    times = [moment for moment in poisson(4000, 5.0, seed=1) if moment is not None]
    assert times == poisson(4000, 5.0, seed=1) and times != poisson(4000, 5.0, seed=2)
    assert times[0] == 0 and times == sorted(times)
    assert 4000 / times[-1] == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize("make", [lambda: closed(0, 1), lambda: closed(3, 0), lambda: poisson(0, 1.0, 0),
                                  lambda: poisson(3, 0.0, 0)])
def test_schedules_that_are_none(make: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match="there must be a request"):
        make()


# ---- what is counted ---------------------------------------------------------------------------------------


def test_pp_with_as_many_requests_as_stages_is_counted_by_hand() -> None:
    """Alone, a token passes all stages before the next one starts. Four requests whose tokens are evenly spread over
    the stages have one emitted with every step; together in one flight, four with every fourth."""
    answers = [recorded(index) for index in range(4)]
    alone = crowd("pp", closed(1, 1), answers[:1])
    assert alone.throughput == pytest.approx(12 / 48e-3)
    bunched = crowd("pp", closed(4, 4), answers)
    assert bunched.throughput == pytest.approx(4 * alone.throughput)
    assert bunched.stations.calls == {f"stage {k}": 12 for k in range(STAGES)}
    assert bunched.stations.rows == {f"stage {k}": 4 * (2 + 12) for k in range(STAGES)}
    spread = crowd("pp", [0.0, 1e-3, 2e-3, 3e-3], answers)
    assert spread.span_s == pytest.approx(51e-3)
    assert spread.stations.busy == pytest.approx({f"stage {k}": 48e-3 for k in range(STAGES)})
    assert [one.tbt_s for one in spread.requests] == pytest.approx([4e-3] * 4)


def test_spread_and_gaps() -> None:
    assert Spread.of([float(value) for value in range(101)]) == Spread(50.0, 90.0, 99.0)
    run = crowd("fullpipe", closed(1, 1), ANSWERS[:1])
    (one,) = run.requests
    assert len(one.gaps) == 11 and sum(one.gaps) == pytest.approx(one.times[-1] - one.times[0])
    assert one.launched_rows > len(one.times) and one.draft_rows > 0


def test_guessing_alone_is_faster_and_its_cost_is_the_drafts_device() -> None:
    plain, ours = (crowd(method, closed(2, 2), ANSWERS[:1] * 2) for method in ("pp", "fullpipe"))
    assert ours.throughput > 1.5 * plain.throughput
    assert "draft" not in plain.stations.calls and ours.stations.calls["draft"] > 0
    assert ours.engine_s > 0


def test_all_requests_are_drafted_for_in_one_job() -> None:
    """Two requests that run in step share every flight; the draft answers both in one call."""
    flights: list[Launched] = []
    run = crowd("fullpipe", closed(2, 2), ANSWERS[:1] * 2,
                listeners=[lambda event: isinstance(event, Launched) and flights.append(event)])
    alone = crowd("fullpipe", closed(1, 1), ANSWERS[:1])
    assert run.stations.calls["draft"] <= 1.25 * alone.stations.calls["draft"]
    assert run.stations.rows["draft"] > 1.5 * alone.stations.rows["draft"]


def test_a_source_begins_anew_with_a_request_that_was_closed_and_goes_on_with_one_that_grew() -> None:
    made: list[int] = []

    def opening(index: int) -> Guesser:
        made.append(index)
        return Guesser(ANSWERS[index])

    source = CrowdDraft(opening)

    def job(opens: list[int], closes: list[int]) -> Flight:
        return Flight(0, [Part(ArenaId(0), [], [7], [ANSWERS[0].prompt[-1]], [2], [2], [[]], [True])],
                      [Opening(ArenaId(one), 3, PARAMS, request=one) for one in opens],
                      list(map(ArenaId, closes)), fanout=4)

    (said,) = source.run(job([0, 1], []))
    assert said.tokens == [2, 100] and made == [0, 1]
    source.run(job([0], []))
    assert made == [0, 1]
    source.run(job([], [0, 1]))
    source.run(job([0], []))
    assert made == [0, 1, 0]


# ---- the study of batching ----------------------------------------------------------------------------------------


def row(method: str, amount: float, throughput: float, tbt: float, load: Any = "closed") -> dict[str, Any]:
    """A journal's row of two requests of eleven tokens each; the second one came a second late."""
    requests = [["a#0", 0.0, 0.5, 0.5 + 10 * tbt, 11, 6, 4, 30, 60],
                ["b#0", 1.0, 2.5, 2.5 + 30 * tbt, 11, 9, 1, 25, 50]]
    return {"cell": asdict(Cell(method, load, amount)), "version": "v", "prompts": ["a#0", "b#0"],
            "preset": "gpus-8", "cluster": "eight", "stages": 2, "target": "big", "draft": "small", "dtype": "bfloat16",
            "note": "invented", "tokens": 22, "span_s": 22 / throughput, "engine_s": 0.022,
            "gaps": [0.0, 0.01, 0.02, 0.03], "requests": requests,
            "stations": {"draft": [1.1 / throughput, 110, 40], "stage 0": [11 / throughput, 60, 20],
                         "stage 1": [5.5 / throughput, 50, 20]}}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path / "journal.jsonl")
    made.add("run/1", provenance())
    for method, throughput, tbt in (("fullpipe", 60.0, 0.02), ("pp", 8.0, 0.14), ("pp-bunched", 10.0, 0.1)):
        made.add(f"closed-1/{method}", row(method, 1, throughput, tbt))
    for method, throughput, tbt in (("fullpipe", 30.0, 0.12), ("pp", 20.0, 0.13), ("pp-bunched", 10.0, 0.1)):
        made.add(f"closed-4/{method}", row(method, 4, throughput, tbt))
    made.add("poisson-0.5/dynamic", row("fullpipe", 0.5, 9.0, 0.02, "poisson"))
    return made


def test_a_row_says_how_long_who_waited_and_what_the_machine_did() -> None:
    one = Measured.of(row("fullpipe", 1, 60.0, 0.02))
    assert one.throughput == pytest.approx(60)
    assert one.ttft.median == pytest.approx((0.5 + 1.5) / 2) and one.tbt.median == pytest.approx(0.04)
    assert one.work == "2.5 / 38% / 5% / 0.75 / 1.5"


def test_the_report_compares_with_the_better_plain_pipeline_and_says_what_is_not_reached(
        journal: Journal, tmp_path: Path) -> None:
    write_report(journal, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "**Virtual time.**" in text and "invented" in text
    assert "| 1 | 6.00x | 5x | yes | 0.20 / 0.20 / 0.20 | yes | - | - | - |" in text
    assert "| 4 | 1.50x | 2.5x | **no** | 1.20 / 1.20 / 1.20 | **no** | - | - | - |" in text
    assert "| 0.5 | 9.0 | - | - |" in text and "versions of the code" not in text


def test_elsewhere_than_on_gpus_8_no_more_is_asked_for_than_pp(tmp_path: Path) -> None:
    made = Journal(tmp_path / "journal.jsonl")
    made.add("run/1", provenance())
    for method, throughput in (("fullpipe", 11.0), ("pp", 10.0)):
        made.add(method, row(method, 1, throughput, 0.1) | {"preset": "cpu-4"})
    write_report(made, tmp_path)
    assert "| 1 | 1.10x | 1x | yes |" in (tmp_path / "report.md").read_text()


def test_a_journal_is_of_one_cluster(journal: Journal) -> None:
    check_cluster(journal, "gpus-8")
    with pytest.raises(UsageError, match="holds cells of gpus-8, not of cpu-4"):
        check_cluster(journal, "cpu-4")


def test_the_report_comes_of_the_receipt_alone_and_is_the_same_each_time(journal: Journal, tmp_path: Path) -> None:
    write_report(journal, tmp_path)
    first = [(tmp_path / name).read_bytes() for name in ("report.md", "batching.svg")]
    write_report(Journal(tmp_path / "empty.jsonl"), tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("report.md", "batching.svg")] == first
    assert first[1].count(b"<svg") == 1 and b"pp-bunched" in first[1]


def test_cells_of_several_versions_are_owned_up_to(journal: Journal, tmp_path: Path) -> None:
    journal.add("closed-8/pp", row("pp", 8, 9.0, 0.1) | {"version": "w"})
    write_report(journal, tmp_path)
    assert "Cells are of 2 versions of the code" in (tmp_path / "report.md").read_text()


def test_who_guesses_whatever_it_costs_never_learns_what_it_costs() -> None:
    """Each row costs as much as the first, which legs soon tell: of four requests few guesses are worth that."""
    answers = [recorded(index) for index in range(12)]
    on = unit_cluster(STAGES)

    def rows(method: str) -> float:
        run = play(answers, closed(12, 4), PARAMS, CrowdDraft(lambda index: Guesser(answers[index])), on,
                   make_engine(method, on), costs=lambda station, rows, measured, context: float(rows))
        return run.stations.rows["stage 0"] / run.tokens

    assert min(rows("equal"), rows("separate")) > 1.1 * rows("fullpipe")


@pytest.mark.parametrize("method", METHODS)
def test_each_method_answers_a_small_crowd_with_its_own_engine(method: str) -> None:
    """On the cluster that is measured, with scripted guesses: the right texts, and no more at a time than it says."""
    on = Cluster.load("gpus-8")
    source = CrowdDraft(lambda index: Guesser(ANSWERS[index])) if not method.startswith("pp") else None
    run = play(ANSWERS, Cell(method, "closed", 6).schedule(6)[:6], PARAMS, source, on, make_engine(method, on))
    assert run.tokens == sum(len(answer.tokens) for answer in ANSWERS)
    first, last = ([one.times[end] for one in run.requests] for end in (0, -1))
    one_by_one = all(start > end for start, end in zip(sorted(first)[1:], sorted(last)))
    assert one_by_one == (method == "one-after-another")


def test_cells_are_named_apart_and_serve_every_prompt_equally_often() -> None:
    cells = all_cells(list(METHODS), AT_ONCE, RATES)
    assert len({cell.key for cell in cells}) == len(cells) == len(METHODS) * (len(AT_ONCE) + len(RATES))
    for cell in cells:
        count = cell.requests(7)
        assert count % 7 == 0 and count == len(cell.schedule(7)) and count >= 3 * cell.amount
        assert sorted(one.id for one in order(ANSWERS, 12)) == sorted([one.id for one in ANSWERS] * 2)
