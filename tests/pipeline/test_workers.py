"""Real processes: what happens when they start badly, die, hang, or are left alone.

Scripted stations need no torch, so that they start quickly.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from fullpipe.errors import PipelineError, StationFailed, UsageError
from fullpipe.messages import Drafted, Event, Failed, Flight, Landed, Opening, Part, Ready
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import SamplingParams
from fullpipe.stations.scripted import hash_token
from fullpipe.stations.spec import StationSpec

pytestmark = pytest.mark.processes

TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}


PARENT = textwrap.dedent("""
    import sys, time, psutil
    sys.path.insert(0, {folder!r})
    from test_workers import WorkersPipeline, _stages, _row
    pipeline = WorkersPipeline(_stages(1, stage_0={{"delay_s": {delay}}}))
    pipeline.launch(_row(0))
    child, = psutil.Process().children()
    if {stop}:
        child.suspend()
    print(child.pid, flush=True)
    sys.stdin.readline()
    {then}
""")


def _stages(count: int, **special: dict[str, Any]) -> list[StationSpec]:
    """Scripted stages; `stage_1={"delay_s": 1}` and the like change single ones."""
    return [StationSpec("fullpipe.stations.scripted:ScriptedStage",
                        {"index": index, "num_stages": count, "truth": TRUTH}
                        | special.get(f"stage_{index}", {})) for index in range(count)]


def _row(number: int) -> Flight:
    """Flight 0 opens request 0 with one prompt token; flight n > 0 is one guess (node n) behind it."""
    if number == 0:
        part = Part(0, [0], [0], [7], [0], [0], [[]], [True])
        return Flight(0, [part], [Opening(0, 1, SamplingParams())])
    return Flight(number, [Part(0, [], [number], [number], [1], [number], [[number]], [True])])


def _until(pipeline: WorkersPipeline, kind: type[Event]) -> Any:
    """The first event of a kind."""
    while True:
        for event in pipeline.events():
            if isinstance(event, kind):
                return event
            assert not isinstance(event, Failed), event


def _until_ready(pipeline: WorkersPipeline, count: int) -> None:
    """Several may come at once."""
    while count > 0:
        count -= sum(isinstance(event, Ready) for event in pipeline.events())


def _until_failed(pipeline: WorkersPipeline) -> Failed:
    while True:
        *_, last = pipeline.events()
        if isinstance(last, Failed):
            return last


def _landings(pipeline: WorkersPipeline, count: int) -> list[Landed]:
    landed: list[Landed] = []
    while len(landed) < count:
        landed += [event for event in pipeline.events() if isinstance(event, Landed)]
    return landed


def _children() -> list[psutil.Process]:
    """Worker processes of this one, in the order of their stations. (Other tests of the session may have
    left helpers of the interpreter's, such as multiprocessing's resource tracker.)"""
    workers = [child for child in psutil.Process().children()
               if "fullpipe.pipeline.worker" in child.cmdline()]
    return sorted(workers, key=lambda child: (child.create_time(), child.pid))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No process, open file, socket or thread is left behind by any test."""
    me = psutil.Process()
    before = me.num_fds()
    yield
    gc.collect()
    assert not _children(), "a process is left"
    _eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("fullpipe")])
    assert me.num_fds() <= before, "a file or socket is left open"


def _eventually(true: Callable[[], bool], within: float = 2.0) -> None:
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, f"not within {within} s"
        time.sleep(0.01)


def test_stage_that_is_killed_is_named_at_once() -> None:
    with WorkersPipeline(_stages(3, stage_2={"delay_s": 0.2})) as pipeline:
        pipeline.launch(_row(0))
        assert isinstance(pipeline.events()[0], Ready)
        _children()[1].kill()
        killed = time.monotonic()
        failed = _until_failed(pipeline)
        assert time.monotonic() - killed < 1
        assert failed.station == "stage 1"
        assert "SIGKILL" in failed.reason
        with pytest.raises(PipelineError, match="has failed: stage 1"):
            pipeline.events()
        started = time.monotonic()
    assert time.monotonic() - started < 2


def test_draft_that_dies_is_named() -> None:
    draft = StationSpec("fullpipe.stations.scripted:EchoDraft", {"delay_s": 60.0})
    with WorkersPipeline(_stages(1), draft) as pipeline:
        pipeline.draft(Flight(0, [Part(0, [], [1], [5], [0], [0], [[]], [True])], fanout=2))
        pipeline.launch(_row(0))
        _until(pipeline, Landed)
        _children()[1].send_signal(signal.SIGSEGV)
        failed = _until_failed(pipeline)
        assert failed.station == "draft"
        assert "SIGSEGV" in failed.reason


def _tapping(count: int, **special: dict[str, Any]) -> list[StationSpec]:
    return [StationSpec(spec.builder, spec.args | {"taps": [index + 1]})
            for index, spec in enumerate(_stages(count, **special))]


def _checker(needs: int) -> StationSpec:
    return StationSpec("fullpipe.stations.drafts.scripted:TapChecker", {"truth": TRUTH, "needs": needs})


def _job(number: int) -> Flight:
    """About what flight `number` brings."""
    job = _row(number)
    job.fanout = 2
    return job


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["stage 0", "stage 1", "draft"])
def test_station_that_is_killed_among_taps_is_named_at_once(victim: int) -> None:
    """Stage 1 is at work, the draft has the taps of stage 0 and waits for more; all three roads are lost to someone."""
    with WorkersPipeline(_tapping(2, stage_1={"delay_s": 2.0}), _checker(needs=2)) as pipeline:
        pipeline.draft(_job(0))
        pipeline.launch(_row(0))
        _until_ready(pipeline, 2)
        _children()[victim].kill()
        killed = time.monotonic()
        failed = _until_failed(pipeline)
        assert time.monotonic() - killed < 1
        assert failed.station == ["stage 0", "stage 1", "draft"][victim]
        assert "SIGKILL" in failed.reason


def test_idle_station_that_is_killed_among_taps_is_named() -> None:
    with WorkersPipeline(_tapping(2, stage_1={"delay_s": 0.3}), _checker(needs=2)) as pipeline:
        pipeline.launch(_row(0))
        _until(pipeline, Landed)
        _children()[2].kill()
        pipeline.launch(_row(1))
        failed = _until_failed(pipeline)
        assert failed.station == "draft"
        assert "SIGKILL" in failed.reason


def test_draft_that_waits_for_a_hung_stage_is_not_the_culprit() -> None:
    """Its job is older than the flight that makes no progress."""
    with WorkersPipeline(_tapping(2, stage_1={"delay_s": 60.0}), _checker(needs=2), timeout=0.6) as pipeline:
        pipeline.draft(_job(0))
        pipeline.launch(_row(0))
        failed = _until_failed(pipeline)
        assert failed.station == "stage 1"
        assert "no progress for 0.6 s with flight 0" in failed.reason


@pytest.mark.parametrize("about", [0, 3], ids=["launched before", "launched after"])
def test_draft_that_never_answers_is_found_out_among_flights_that_land(about: int) -> None:
    """It says that it waits, but all it can wait for has come."""
    with WorkersPipeline(_tapping(2), _checker(needs=3), timeout=0.5) as pipeline:
        if about:
            pipeline.draft(_job(about))
        pipeline.launch(_row(0))
        if not about:
            pipeline.draft(_job(0))
        begun, failed = time.monotonic(), None
        for number in range(1, 10_000):
            slot = 1 + number % 60
            pipeline.launch(Flight(number, [Part(0, [], [number], [7], [1], [slot], [[slot]], [True])]))
            events = pipeline.events(5.0)
            if failed := next((event for event in events if isinstance(event, Failed)), None):
                break
        assert failed and time.monotonic() - begun < 5
        assert failed.station == "draft"
        assert f"no progress for 0.5 s with job {about}" in failed.reason


def test_draft_that_waits_for_a_slow_prompt_is_not_to_blame() -> None:
    """Its last chunk, which is asked about, is launched only when more time has passed than the draft may take."""
    chunks = 4
    with WorkersPipeline(_tapping(1, stage_0={"delay_s": 0.3}), _checker(needs=1), timeout=0.6) as pipeline:
        last = Part(0, [chunks], [7], [7], [chunks], [chunks], [[]], [True])
        pipeline.draft(Flight(0, [last], [Opening(0, chunks + 1, SamplingParams())], fanout=2))
        for number in range(chunks):
            part = Part(0, [number], [-1], [5], [number], [number], [[]], [False])
            opens = [] if number else [Opening(0, chunks + 1, SamplingParams())]
            pipeline.launch(Flight(number, [part], opens))
            _until(pipeline, Landed)
        pipeline.launch(Flight(chunks, [last]))
        assert _until(pipeline, Drafted).job == 0


def test_job_whose_taps_nobody_sends_is_overdue() -> None:
    with WorkersPipeline(_tapping(1), _checker(needs=2), timeout=0.5) as pipeline:
        pipeline.draft(_job(0))
        pipeline.launch(_row(0))
        failed = _until_failed(pipeline)
        assert failed.station == "draft"
        assert "no progress for 0.5 s with job 0" in failed.reason


def test_tap_that_is_not_what_it_should_be_is_reported() -> None:
    """Stages that tap the same layer."""
    stages = [StationSpec(spec.builder, spec.args | {"taps": [1]}) for spec in _stages(2)]
    with WorkersPipeline(stages, _checker(needs=2)) as pipeline:
        pipeline.draft(_job(0))
        pipeline.launch(_row(0))
        failed = _until_failed(pipeline)
        assert failed.station == "draft"
        assert failed.reason.startswith("AssertionError: flight 0 came again, or late")


def test_draft_at_work_delays_no_stage_that_taps() -> None:
    """Flights land while it works on one job, and their taps have all come by the next."""
    flights = 20
    with WorkersPipeline(_tapping(2), _checker(needs=1), pace={"draft": {1: 0.5}}) as pipeline:
        assert pipeline.machine().reads_taps
        pipeline.draft(_job(0))
        for number in range(flights):
            pipeline.launch(_row(number))
        events: list[Event] = []
        while not any(isinstance(event, Drafted) for event in events):
            events += pipeline.events()
        assert sum(isinstance(event, Landed) for event in events) == flights
        assert pipeline.taps.count < 2 * flights, "what has come meanwhile waits"
        pipeline.draft(_job(1))
        _until(pipeline, Drafted)
        assert pipeline.taps.count == 2 * flights


def test_taps_that_the_source_does_not_read_are_dropped() -> None:
    draft = StationSpec("fullpipe.stations.scripted:EchoDraft")
    with WorkersPipeline(_tapping(2), draft) as pipeline:
        for number in range(3):
            pipeline.launch(_row(number))
        _landings(pipeline, 3)
        pipeline.draft(_job(1))
        _until(pipeline, Drafted)
        assert pipeline.taps.count == 0


def test_stages_may_tap_where_there_is_no_draft() -> None:
    with WorkersPipeline(_tapping(1)) as pipeline:
        assert not pipeline.machine().reads_taps
        pipeline.launch(_row(0))
        assert _until(pipeline, Landed).nodes == [0]


def test_draft_that_raises_is_named() -> None:
    draft = StationSpec("fullpipe.stations.scripted:EchoDraft", {"fail_at": 0})
    with WorkersPipeline(_stages(1), draft) as pipeline:
        pipeline.draft(Flight(0))
        failed = _until_failed(pipeline)
        assert failed.station == "draft"
        assert failed.reason.startswith("RuntimeError: scripted failure at job 0")


def test_stopped_stage_is_named_within_the_heartbeat_timeout() -> None:
    with WorkersPipeline(_stages(1), heartbeat_timeout=0.4) as pipeline:
        pipeline.launch(_row(0))
        _until(pipeline, Landed)
        _children()[0].suspend()
        stopped = time.monotonic()
        pipeline.launch(_row(1))
        failed = _until_failed(pipeline)
        assert 0.2 < time.monotonic() - stopped < 1
        assert (failed.station, failed.reason) == ("stage 0", "no sign of life for 0.4 s")
        closing = time.monotonic()
    assert time.monotonic() - closing < 2, "a stopped process takes no SIGTERM, and is killed"


def test_station_that_makes_no_progress_is_named() -> None:
    """Its heart beats, so only the flight that never comes tells."""
    with WorkersPipeline(_stages(2, stage_1={"delay_s": 60.0}), timeout=0.5) as pipeline:
        pipeline.launch(_row(0))
        failed = _until_failed(pipeline)
        assert failed.station == "stage 1"
        assert "no progress for 0.5 s with flight 0" in failed.reason


def test_error_in_a_stage_is_told_with_its_log() -> None:
    with WorkersPipeline(_stages(1, stage_0={"fail_at": 1})) as pipeline:
        pipeline.launch(_row(0))
        _until(pipeline, Landed)
        pipeline.launch(_row(1))
        failed = _until_failed(pipeline)
        assert failed.station == "stage 0"
        assert failed.reason.startswith("RuntimeError: scripted failure at flight 1")
        assert "Traceback" in failed.reason


def test_cancel_overtakes_waiting_flights() -> None:
    with WorkersPipeline(_stages(2, stage_0={"delay_s": 0.15})) as pipeline:
        for number in range(3):
            pipeline.launch(_row(number))  # without waiting for Ready, so that they queue up
        pipeline.cancel([2])
        landed = _landings(pipeline, 3)
        assert [event.nodes for event in landed] == [[0], [1], []]
        assert [leg.nodes for leg in landed[2].legs] == [[], []], "never computed"
        assert landed[1].tokens == [hash_token([7, 1], 50, 3)]


def test_error_while_building_has_its_type_and_names_the_station() -> None:
    with pytest.raises(UsageError, match="stage 1: no such truth") as caught:
        WorkersPipeline(_stages(2, stage_1={"truth": {"kind": "oracle"}}))
    assert caught.value.hint
    assert type(caught.value) is UsageError


def test_foreign_error_while_building_becomes_station_failed() -> None:
    with pytest.raises(StationFailed, match="unexpected keyword") as caught:
        WorkersPipeline(_stages(1, stage_0={"colour": "red"}))
    assert caught.value.station == "stage 0"


def test_start_that_takes_too_long_is_given_up() -> None:
    with pytest.raises(StationFailed, match="not ready after") as caught:
        WorkersPipeline(_stages(2), start_timeout=0.05)
    assert caught.value.station == "stage 0, stage 1"


@pytest.mark.parametrize("arguments", [{"stages": []}, {"threads": 0}, {"timeout": 0.0},
                                       {"heartbeat_timeout": -1.0}, {"start_timeout": 0.0}])
def test_arguments_out_of_range(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        WorkersPipeline(**{"stages": _stages(1)} | arguments)


def test_two_at_once_from_threads_that_end() -> None:
    """Neither collides with the other, and no worker dies with the thread in which it was asked for."""
    made: list[WorkersPipeline] = []
    threads = [threading.Thread(target=lambda: made.append(WorkersPipeline(_stages(2))))
               for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(3):
        for pipeline in made:
            pipeline.launch(_row(number))
    expected = [[hash_token(path, 50, 3)] for path in ([7], [7, 1], [7, 2])]
    for pipeline in made:  # the second goes on after the first is closed
        assert [event.tokens for event in _landings(pipeline, 3)] == expected
        pipeline.close()


def test_closed_pipeline_says_so_and_close_may_be_repeated() -> None:
    pipeline = WorkersPipeline(_stages(1))
    pipeline.close()
    pipeline.close()
    pipeline.cancel([1])  # nothing depends on it, now less than ever
    for use in (pipeline.events, lambda: pipeline.launch(_row(0))):
        with pytest.raises(PipelineError, match="closed"):
            use()


def test_close_from_another_thread_wakes_the_waiting_one() -> None:
    pipeline = WorkersPipeline(_stages(1, stage_0={"delay_s": 30.0}))
    pipeline.launch(_row(0))
    assert isinstance(pipeline.events()[0], Ready)
    closer = threading.Timer(0.1, pipeline.close)
    closer.start()
    with pytest.raises(PipelineError, match="closed"):
        pipeline.events()
    closer.join()


def test_interrupted_start_leaves_nothing() -> None:
    """Ctrl-C while the processes are being started, as the terminal sends it: to the main thread."""
    main = threading.main_thread().ident
    assert main
    interrupt = threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT])
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        WorkersPipeline(_stages(2))
    interrupt.join()


def test_fork_does_not_end_its_parents_pipeline() -> None:
    code = PARENT.format(folder=os.path.dirname(__file__), delay=0.0, stop=False, then=textwrap.dedent("""
        import os
        if os.fork() == 0:
            pipeline.close()
            sys.exit(0)
        assert os.wait()[1] == 0
        pipeline.events()
        pipeline.close()
    """))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20, stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL)


def test_forgotten_pipeline_ends_with_its_last_reference() -> None:
    pipeline = WorkersPipeline(_stages(1))
    assert _children()
    del pipeline
    gc.collect()
    assert not _children()


def test_waiting_for_nothing_is_refused() -> None:
    with WorkersPipeline(_stages(1)) as pipeline:
        assert isinstance(pipeline.events()[0], Ready)
        with pytest.raises(PipelineError, match="nothing is under way"):
            pipeline.events()


def test_worker_that_dies_while_nothing_is_under_way_is_named() -> None:
    with WorkersPipeline(_stages(1)) as pipeline:
        assert isinstance(pipeline.events(0.0)[0], Ready)
        assert pipeline.events(0.0) == []
        _children()[0].kill()
        (failed,) = pipeline.events(10.0)
        assert isinstance(failed, Failed) and failed.station == "stage 0"
        assert "SIGKILL" in failed.reason


def test_worker_that_falls_silent_while_nothing_is_under_way_is_named() -> None:
    with WorkersPipeline(_stages(1), heartbeat_timeout=0.4) as pipeline:
        assert isinstance(pipeline.events(0.0)[0], Ready)
        _children()[0].suspend()
        (failed,) = pipeline.events(10.0)
        assert isinstance(failed, Failed)
        assert (failed.station, failed.reason) == ("stage 0", "no sign of life for 0.4 s")


def _orphan(stop: bool, then: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    code = PARENT.format(folder=os.path.dirname(__file__), delay=60.0, stop=stop, then=then)
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin and parent.stdout
    with parent.stdin, parent.stdout:  # it goes on when its input ends: not before its worker has been looked up
        return parent, psutil.Process(int(parent.stdout.readline()))


@pytest.mark.parametrize("stop", [False, True], ids=["running", "stopped"])
def test_no_worker_outlives_a_killed_parent(stop: bool) -> None:
    parent, worker = _orphan(stop, "time.sleep(60)")
    parent.kill()
    parent.wait()
    worker.wait(timeout=2)


def test_no_worker_outlives_an_interpreter_that_ends_without_close() -> None:
    parent, worker = _orphan(stop=False, then="sys.exit(0)")
    assert parent.wait(timeout=5) == 0
    assert not worker.is_running()


def test_interrupt_from_the_terminal_reaches_the_parent_alone() -> None:
    with WorkersPipeline(_stages(1)) as pipeline:
        worker = _children()[0]
        assert os.getsid(worker.pid) != os.getsid(0), "not in the terminal's foreground group"
        worker.send_signal(signal.SIGINT)
        pipeline.launch(_row(0))
        assert _until(pipeline, Landed).flight == 0
