"""Several hosts: who is asked what, what stages did meanwhile, what is said of it, and cells that are not run twice."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from command import Models
from hypothesis import given
from hypothesis import strategies as st

from fullpipe.errors import UsageError
from fullpipe.events import Emitted
from fullpipe.messages import Landed, Leg
from fullpipe_lab.hosts import llamacpp_rpc as rpc
from fullpipe_lab.hosts.asking import ask_ours, best_size
from fullpipe_lab.hosts.figures import beside, rival_rows, rows_of
from fullpipe_lab.hosts.llamacpp_rpc import Server, llamacpp_rpc
from fullpipe_lab.hosts.meter import Meter, stays_within, together
from fullpipe_lab.hosts.ours import Cluster, Running, start_cluster
from fullpipe_lab.hosts.places import Answer, Carried, link_bytes
from fullpipe_lab.peers.process import RunnerFailed
from fullpipe_lab.peers.run import Question
from fullpipe_lab.studies import hosts as study

FAKE = Path(__file__).with_name("fake_completions.py")
MODEL = Path("/models/m.gguf")


class Here:
    """Two hosts that are this one, and a link on which every look finds 100 bytes more, each way."""

    def __init__(self) -> None:
        self._looks = 0

    def address(self, name: str) -> str:
        return "127.0.0.1"

    def command(self, name: str, argv: list[str], core: int | None = None) -> list[str]:
        return list(argv)

    def counts(self) -> Mapping[tuple[str, str], Carried]:
        self._looks += 1
        return dict.fromkeys((("h1", "h2"), ("h2", "h1")), cast(Carried, SimpleNamespace(bytes=100 * self._looks)))


# ---- what stages did -------------------------------------------------------------------------------------


def test_overlap_is_the_time_in_which_two_or_more_compute() -> None:
    assert together([[(0.0, 2.0)], [(1.0, 3.0)], [(1.5, 1.75)]]) == 1.0
    assert together([[(0.0, 1.0)], [(1.0, 2.0)]]) == together([]) == 0.0


@given(st.lists(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=4), max_size=4))
def test_overlap_is_that_of_counting_moments(stages: list[list[tuple[int, int]]]) -> None:
    stays: list[list[tuple[float, float]]] = []
    for legs in stages:  # one after the other
        stays.append([])
        now = 0
        for wait, length in legs:
            stays[-1].append((now + wait, now + wait + length))
            now += wait + length
    busy = [sum(any(start <= moment < end for start, end in found) for found in stays) for moment in range(120)]
    assert together(stays) == sum(count > 1 for count in busy)


def test_stays_are_cut_to_the_window_and_drafts_do_not_count() -> None:
    legs = [Leg("stage 0", 0.0, 2.0, []), Leg("stage 1", 5.0, 6.0, []), Leg("draft", 1.0, 2.0, [])]
    assert stays_within(legs, (1.0, 4.0)) == {"stage 0": [(1.0, 2.0)]}


def test_the_meter_tells_of_one_answer_at_a_time() -> None:
    meter = Meter()
    legs = [Leg("stage 0", 1.0, 2.0, [1]), Leg("stage 1", 1.5, 3.0, [1])]
    for _ in range(2):
        meter.begin()
        meter(Landed(time=3.0, flight=0, legs=legs))
        for when in (1.0, 3.0):
            meter(Emitted(time=when, request=0, node=0, token=1, position=0, fate="hit"))
        assert meter.told() == {"overlap": 0.25, "busy": {"stage 0": 0.5, "stage 1": 0.75}}
        assert len(meter.times) == 2 and meter.times == sorted(meter.times)
    meter.begin()
    assert meter.told() == {"overlap": 0.0, "busy": {}}


def test_links_are_counted_both_ways_together() -> None:
    assert link_bytes(Here()) == {"h1-h2": 200}


# ---- llama.cpp -------------------------------------------------------------------------------------------


def test_the_second_host_gets_half_of_the_layers_and_the_head() -> None:
    words = Server(MODEL, 28, "ngram-simple").words
    assert words[words.index("-ngl") + 1] == "15" and words[-2:] == ["--spec-type", "ngram-simple"]
    assert "-md" in Server(MODEL, 28, "draft", MODEL).words and "-md" not in Server(MODEL, 28, "plain", MODEL).words


def test_a_mode_that_is_unknown_or_lacks_its_draft_is_refused() -> None:
    with pytest.raises(UsageError, match="no mode 'lookup'"):
        Server(MODEL, 28, "lookup")
    with pytest.raises(UsageError, match="needs a draft model"):
        Server(MODEL, 28, "draft")


def test_without_the_programs_it_is_said_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLPIPE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="not compiled"), llamacpp_rpc(Here(), Server(MODEL, 2)):
        pass


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.fixture
def fake_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment whose programs are the fake; its folder of programs."""
    monkeypatch.setenv("FULLPIPE_HOME", str(tmp_path))
    programs = tmp_path / "peers" / rpc.ENVIRONMENT / "bin"
    programs.mkdir(parents=True)
    (programs.parent / "fullpipe.json").write_text("{}")
    for name, told in (("ggml-rpc-server", "mute"), ("llama-server", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} {told} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setattr(rpc, "_RPC_PORT", free_port())
    monkeypatch.setattr(rpc, "_HTTP_PORT", free_port())
    return programs


def servers() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if str(FAKE) in one.cmdline()]


def test_it_is_asked_by_token_ids_and_nothing_is_left_of_it(fake_programs: Path) -> None:
    with llamacpp_rpc(Here(), Server(MODEL, 2)) as rival:
        answer = rival.ask([1, 4], 3)
        started = servers()
        assert len(started) == 2
    assert answer.tokens == [5, 6, 7] and len(answer.times) == 3
    assert answer.told == {"tbt_ms": 7.0, "prompt_ms": 3.0, "drafted": 2, "accepted": 1}
    assert psutil.wait_procs(started, timeout=5)[1] == []


def test_a_server_that_does_not_start_says_why(fake_programs: Path) -> None:
    (fake_programs / "llama-server").write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} crash\n')
    with pytest.raises(RunnerFailed, match="ended with code 1: out of luck"), llamacpp_rpc(Here(), Server(MODEL, 2)):
        pass
    assert servers() == []


def test_a_question_that_is_refused_is_an_error(fake_programs: Path) -> None:
    with llamacpp_rpc(Here(), Server(MODEL, 2)) as rival, pytest.raises(RunnerFailed, match="answered 400"):
        rival.ask([], 3)


@pytest.mark.parametrize("said", [{}, {"tokens": [1], "times": []}, {"tokens": [1, 2], "times": [2.0, 1.0]},
                                  {"tokens": [], "times": [], "told": 3}])
def test_what_is_no_answer_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(RunnerFailed, match="gave an answer that is not"):
        Answer.of(said)


# ---- ours ------------------------------------------------------------------------------------------------


def test_the_head_answers_with_what_its_stages_did(models: Models) -> None:
    cluster = Cluster(str(models.target), "ngram", hosts=1, dtype="float32")
    with start_cluster(Here(), cluster) as running:
        answer = running.ask([5, 6, 7, 5, 6], 6, "pipedec", 2)
        again = running.ask([5, 6, 7, 5, 6], 6, "fullpipe")
    assert running.settings["stages"] == 1 and answer.told["promise_ms"] is None and again.told["promise_ms"] > 0
    assert answer.tokens == again.tokens and len(answer.times) == 6
    assert set(answer.told["busy"]) == {"stage 0"} and 0 <= answer.told["overlap"] <= 1
    assert answer.told["hits"] + answer.told["misses"] == 5


class Scripted:
    """Stands where `Running` does: an answer takes what `seconds` says of the size."""

    settings: Mapping[str, Any] = {}

    def __init__(self, seconds: Mapping[int | None, float], methods: list[str] | None = None) -> None:
        self._seconds = seconds
        self.methods = [] if methods is None else methods
        self.asked: list[int | None] = []

    def ask(self, prompt: list[int], tokens: int, method: str = "", size: int | None = None) -> Answer:
        """A method "breaks" fails, "strange" says otherwise."""
        if method == "breaks":
            self.methods.append(method)
            raise RunnerFailed("its process\nended")
        if not self.methods or self.methods[-1] != method:
            self.methods.append(method)
        self.asked.append(size)
        step, first = self._seconds[size], 2 if method == "strange" else 1
        return Answer([*range(first, first + tokens)], [0.5 + step * index for index in range(tokens)],
                      {"hits": 3, "misses": 1, "overlap": 0.5, "tbt_ms": 1.0, "drafted": 0, "accepted": 0})


SIZES = {"width": (1, 2), "depth": (4, 8)}
ASKED = [Question("s/a", "code", [1]), Question("s/b", "code", [2])]


def test_the_others_get_their_best_size_and_ours_runs_as_it_comes() -> None:
    on = Scripted({None: 0.3, 1: 0.3, 2: 0.2, 4: 0.2, 8: 0.1})
    sizes = [best_size(cast(Running, on), [1], method, SIZES, 4) for method in ("chain", "pipedec", "pp", "fullpipe")]
    assert sizes == [8, 2, None, None] and on.asked == [4, 8, 1, 2]


def test_a_row_says_what_was_answered_and_sent() -> None:
    on = Scripted({None: 0.5, 4: 0.1, 8: 0.25})
    rows = ask_ours(cast(Running, on), Here(), "chain", ASKED, [9], SIZES, 3)
    assert [row["prompt"] for row in rows] == ["s/a", "s/b"] and on.asked == [None, 4, 8, 4, 4]
    assert rows[0]["times"] == [0.5, 0.6, 0.7] and rows[0]["link_bytes"] == {"h1-h2": 200} and rows[0]["size"] == 4


# ---- what is said ----------------------------------------------------------------------------------------


def cell(who: str, steps: list[float], *, delay: float = 10.0, tokens: list[int] | None = None,
         promise: float | None = None) -> dict[str, Any]:
    """Two prompts, with three tokens each; steps: seconds between them."""
    samples = [{"prompt": f"s{index}/p", "task": "code", "tokens": tokens or [1, 2, 3],
                "times": [1.0, 1.0 + step, 1.0 + 2 * step], "size": None, "link_bytes": {"h1-h2": 300},
                "told": {"hits": 3, "misses": 1, "overlap": step, "tbt_ms": 1.0, "drafted": 4, "accepted": 2,
                         "promise_ms": promise}}
               for index, step in enumerate(steps)]
    return {"hosts": 2, "delay_ms": delay, "method": who, "mode": who, "settings": {},
            "samples": samples}


def test_a_method_is_compared_with_pp_where_it_stands() -> None:
    cells = [cell("pp", [0.4, 0.4]), cell("fullpipe", [0.1, 0.4], promise=230.0), cell("pp", [9.0, 9.0], delay=50.0)]
    plain, ours, _ = rows_of(cells)
    assert plain["speedup"] == 1.0 and plain["kept"] is None
    assert (ours["speedup"], ours["speedup_range"], ours["tbt_ms"]) == (2.0, [1.0, 4.0], 250.0)
    assert (ours["promise_over"], ours["kept"], ours["identical"]) == (0.92, True, True)
    assert ours["bytes_per_token"] == {"h1-h2": 100} and ours["hit_rate"] == 0.75 and ours["tokens_per_s"] == 2.0
    assert ours["overlap"] == 0.34  # weighted by seconds


def test_a_method_without_pp_beside_it_has_no_speedup_and_another_text_is_told() -> None:
    first, other = rows_of([cell("chain", [0.1, 0.1]), cell("fullpipe", [0.1, 0.1], tokens=[1, 2, 4])])
    assert first["speedup"] is None and first["identical"] and not other["identical"]


def test_the_better_mode_of_each_prompt_counts() -> None:
    ours, theirs = cell("fullpipe", [0.1, 0.1]), [cell("plain", [0.4, 0.2]), cell("ngram-simple", [0.2, 0.8]),
                                                 cell("plain", [0.01, 0.01], delay=50.0)]
    rows = beside([cell("pp", [0.5, 0.5]), ours], theirs)
    assert [(row["set"], row["tbt_ahead"], row["reached"]) for row in rows] == [
        ("s0", 2.0, None), ("s1", 2.0, None), ("all", 2.0, True)]
    assert rival_rows([ours], theirs)[1] == {"delay_ms": 10.0, "mode": "ngram-simple", "prompts": 2, "tbt_ms": 500.0,
                                             "own_ms": 1.0, "drafted": 8, "accepted": 4, "bytes_per_token": 100,
                                             "same_text": 2}


# ---- the study -------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The study with nobody behind it; which methods and modes were asked."""
    cells: list[str] = []

    @contextmanager
    def opened(hosts: int, ms: float) -> Iterator[Here]:
        yield Here()

    @contextmanager
    def ours(lab: Here, on: Cluster) -> Iterator[Scripted]:
        yield Scripted(dict.fromkeys((None, 2, 4), 0.1), cells)

    @contextmanager
    def theirs(lab: Here, server: Server) -> Iterator[Scripted]:
        cells.append(server.mode)
        yield Scripted({None: 0.3}, [])

    monkeypatch.setattr(study, "opened", opened)
    monkeypatch.setattr(study, "start_cluster", ours)
    monkeypatch.setattr(study, "llamacpp_rpc", theirs)
    monkeypatch.setattr(study, "settings", lambda server: {})
    monkeypatch.setattr(study, "questions", lambda *_: (ASKED, [9]))
    monkeypatch.setattr(study, "resolve", Path)
    monkeypatch.setattr(study, "open_model", lambda path: SimpleNamespace(config=SimpleNamespace(num_layers=4)))
    monkeypatch.setattr(study, "commit_of", lambda _: ("c", False))
    yield cells


def started(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["hosts", "--quick", "--out", str(out), *words])
    study.main()


def test_cells_that_are_done_are_not_measured_again(measured: list[str], monkeypatch: pytest.MonkeyPatch,
                                                    tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(monkeypatch, tmp_path, "--methods", "pp,fullpipe")
    assert measured == ["pp", "fullpipe", "pp", "fullpipe"]
    monkeypatch.setattr(study, "STUDIES", tmp_path)
    started(monkeypatch, tmp_path, "--methods", "pp,chain,fullpipe", "--rival", "--write", "kept")
    assert measured[4:] == ["chain", "plain", "ngram-simple", "plain", "ngram-simple"]
    report = (tmp_path / "report.md").read_text()
    assert "| 0.1 | all | 2 | 100.0 | 300.0 | 3.00 | 1 | yes |" in report
    assert report in capsys.readouterr().out
    receipt = json.loads((tmp_path / "kept.json").read_text())
    assert receipt["benchmark"] == "hosts" and len(receipt["samples"]) == 10 and len(receipt["results"]["cells"]) == 6


def test_a_cell_that_fails_is_told_and_left_for_the_next_time(measured: list[str], monkeypatch: pytest.MonkeyPatch,
                                                              tmp_path: Path) -> None:
    for times in (1, 2):
        with pytest.raises(SystemExit, match=r"2/0\.1/breaks: its process"):
            started(monkeypatch, tmp_path, "--methods", "breaks,pp")
        assert measured.count("breaks") == 2 * times and measured.count("pp") == 2


def test_texts_that_differ_end_it_with_an_error(measured: list[str], monkeypatch: pytest.MonkeyPatch,
                                                tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="texts differ"):
        started(monkeypatch, tmp_path, "--methods", "pp,strange")
    assert "**no**" in (tmp_path / "report.md").read_text()
