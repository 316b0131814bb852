"""The load generator: what is sent and when, what is made of every kind of answer, and the verb around it."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from fake_openai import KEY, Fake, serving
from typer.testing import CliRunner, Result

from fullpipe.cli.load import load
from fullpipe.cli.verb import verb
from fullpipe.errors import MissingExtra, UsageError
from fullpipe.prompts import FilePrompt
from fullpipe.server.load import LoadResult, LoadSample, Spread, Traffic, distinct, run_load, take
from fullpipe.server.openai_stream import Server, events, served_model


@pytest.fixture(scope="module")
def shared() -> Iterator[Fake]:
    with serving() as fake:
        yield fake


@pytest.fixture
def fake(shared: Fake) -> Fake:
    """The server, as if nobody had asked it anything."""
    shared.gate.set()
    until(lambda: not shared.at_once)
    shared.bodies.clear()
    shared.most = 0
    return shared


def until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.002)


@contextmanager
def gate_that_opens_at(fake: Fake, at_once: int) -> Iterator[None]:
    """No answer goes on until so many are under way."""
    fake.gate.clear()
    watcher = threading.Thread(target=lambda: (until(lambda: fake.at_once >= at_once), fake.gate.set()))
    watcher.start()
    yield
    watcher.join()


def prompts(*texts: str) -> list[FilePrompt]:
    return [FilePrompt(str(place), "test", (text,)) for place, text in enumerate(texts)]


def ran(fake: Fake, *texts: str, **traffic: Any) -> LoadResult:
    if "rate" not in traffic:
        traffic.setdefault("concurrency", 1)
    return run_load(Server(fake.url, "fake-1"), prompts(*texts), Traffic(**traffic))


def sample(**values: Any) -> LoadSample:
    return LoadSample.model_validate(
        {"index": 0, "prompt": "0", "sent_s": 0.0, "late_s": 0.0, "arrivals": [1.0, 1.5, 3.0], "end_s": 4.0,
         "prompt_tokens": 4, "tokens": 5, "finish": "length", "text": "abc", "error": None, "detail": ""} | values)


def result_of(*samples: LoadSample) -> LoadResult:
    return LoadResult(url="http://x", model="m", endpoint="chat", concurrency=2, rate=None, max_tokens=8,
                      temperature=0.0, seed=7, ignore_eos=False, asked=len(samples), interrupted=False,
                      client_cpu_s=0.0, samples=list(samples))


# ---- one request -------------------------------------------------------------------------------------------


def test_an_answer_is_counted_by_its_usage_and_timed_by_its_chunks(fake: Fake) -> None:
    (one,) = ran(fake, "hello").samples
    assert (one.text, one.tokens, one.prompt_tokens, one.finish) == ("one two\u2028 three", 5, 4, "length")
    assert one.error is None and len(one.arrivals) == 3
    assert 0 < one.arrivals[0] <= one.arrivals[1] <= one.arrivals[2] <= one.end_s


def test_what_is_asked(fake: Fake) -> None:
    ran(fake, "hello", max_tokens=9, temperature=0.5, seed=3, ignore_eos=True)
    ran(fake, "hello", endpoint="completions")
    chat, plain = fake.bodies
    assert chat == {"model": "fake-1", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 9,
                    "temperature": 0.5, "seed": 3, "ignore_eos": True, "stream": True,
                    "stream_options": {"include_usage": True}}
    assert plain["prompt"] == "hello" and "messages" not in plain and "ignore_eos" not in plain


def test_completions_are_read_too(fake: Fake) -> None:
    (one,) = ran(fake, "hello", endpoint="completions").samples
    assert (one.text, one.tokens, len(one.arrivals), one.error) == ("one two\u2028 three", 5, 3, None)


@pytest.mark.parametrize(("prompt", "kind", "detail", "text"), [
    ("refuse", "status 429", "the queue is full", ""),
    ("break", "status 502", "<html>oh</html>", ""),
    ("error", "error event", "stage 1 failed", "one"),
    ("nonsense", "nonsense", "{truncated", "one two\u2028 three"),
    ("cut", "cut off", "the stream ended without [DONE]", "one"),
    ("abort", "ended: abort", "", "one two\u2028 three"),
    ("uncounted", "no usage", "the server does not count tokens in streams (stream_options.include_usage)",
     "one two\u2028 three"),
])
def test_each_failure_has_a_kind_and_keeps_what_came(fake: Fake, prompt: str, kind: str, detail: str,
                                                     text: str) -> None:
    result = ran(fake, "fine", prompt, "fine")
    assert [one.error for one in result.samples] == [None, kind, None]
    assert (result.samples[1].detail, result.samples[1].text) == (detail, text)
    assert result.summary().failures == {kind: 1}


def test_an_answer_that_does_not_end_is_given_up(fake: Fake) -> None:
    fake.gate.clear()
    (one,) = ran(fake, "wait", limit_s=0.05).samples
    assert (one.error, one.detail, one.text) == ("timeout", "no end after 0.05 s", "wait")


def test_no_server_is_a_failure_of_each_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    result = run_load(Server(url, "m"), prompts("a", "b"), Traffic(concurrency=2))
    assert result.summary().failures == {"no connection": 2} and result.summary().tokens_per_s == 0


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_events_are_found_however_their_bytes_are_cut(size: int) -> None:
    stream = ('data: {"a":"\u2028"}\n\nevent: x\ndata:1\ndata: 2\n\n: heartbeat\n\ndata: [DONE]\r\n\r\n'
              'data: never ended').encode()

    async def cut() -> AsyncIterator[bytes]:
        for start in range(0, len(stream), size):
            yield stream[start : start + size]

    async def found() -> list[bytes]:
        return [data async for data in events(cut())]

    assert asyncio.run(found()) == ['{"a":"\u2028"}'.encode(), b"1\n2", b"[DONE]"]


# ---- when requests come ------------------------------------------------------------------------------------


def test_so_many_at_once_and_never_more(fake: Fake) -> None:
    with gate_that_opens_at(fake, 3):
        result = ran(fake, *["wait"] * 8, concurrency=3)
    assert fake.most == 3 and [one.index for one in result.samples] == list(range(8))
    assert not result.summary().failed


def test_poisson_arrivals_are_the_seeds() -> None:
    times = Traffic(rate=4.0, seed=1).arrivals(4000)
    assert times[0] == 0 and times == sorted(times)
    assert times == Traffic(rate=4.0, seed=1).arrivals(4000) != Traffic(rate=4.0, seed=2).arrivals(4000)
    gaps = [later - sooner for sooner, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 4, rel=0.05)
    # An exponential's deviation is its mean.
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)


def test_an_open_loop_does_not_wait_for_answers(fake: Fake) -> None:
    with gate_that_opens_at(fake, 5):
        result = ran(fake, *["wait"] * 5, rate=1000.0)
    assert result.rate == 1000.0 and len(result.whole) == 5
    due = Traffic(rate=1000.0).arrivals(5)
    assert [one.sent_s - one.late_s for one in result.samples] == pytest.approx(due, abs=2e-3)


@pytest.mark.parametrize("values", [{}, {"concurrency": 1, "rate": 1.0}, {"concurrency": 0}, {"rate": 0.0},
                                    {"rate": float("nan")}])
def test_a_load_is_by_concurrency_or_by_rate(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Traffic(**values)


# ---- what is made of it ------------------------------------------------------------------------------------


def test_a_summary_counted_by_hand() -> None:
    result = result_of(sample(), sample(index=1, sent_s=1.0, arrivals=[2.0, 4.0], tokens=3, end_s=9.0),
                       sample(index=2, sent_s=2.0, error="timeout", end_s=3.0, tokens=None))
    summary = result.summary()
    assert (summary.answered, summary.failed, summary.failures) == (2, 1, {"timeout": 1})
    assert (summary.tokens, summary.span_s, summary.tokens_per_s, summary.requests_per_s) == (8, 10.0, 0.8, 0.2)
    assert summary.ttft_s and summary.ttft_s.median == 1.5
    assert result.samples[0].tbt_s == 0.5 and result.samples[1].tbt_s == 1.0
    assert summary.tbt_s == Spread(2, 0.75, pytest.approx(0.95), pytest.approx(0.995))  # type: ignore[arg-type]
    assert summary.gap_s and (summary.gap_s.count, summary.gap_s.median) == (3, 1.5)
    assert summary.latency_s and summary.latency_s.median == 6.5


@pytest.mark.parametrize("values", [{"tokens": 1, "arrivals": [1.0]}, {"arrivals": []}, {"tokens": None}])
def test_too_little_for_a_time_between_tokens(values: dict[str, Any]) -> None:
    one = sample(**values)
    assert one.tbt_s is None and result_of(one).summary().tbt_s is None


def test_nothing_answered_is_a_summary_too() -> None:
    summary = result_of().summary()
    assert (summary.span_s, summary.tokens_per_s, summary.ttft_s) == (0.0, 0.0, None)


def test_a_result_survives_json(fake: Fake) -> None:
    result = ran(fake, "hello", "refuse")
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert LoadResult.from_dict(json.loads(text)) == result
    assert json.loads(text)["summary"]["tokens"] == 5


def test_prompts_are_repeated_and_told_apart() -> None:
    taken = take(prompts("a", "b"), 3)
    assert [one.text for one in taken] == ["a", "b", "a"]
    assert [one.text for one in distinct(taken, "8")] == ["[8.0] a", "[8.1] b", "[8.2] a"]
    assert len({one.id for one in distinct(taken, "8")}) == 3
    assert take(prompts("a", "b"), None) == prompts("a", "b")


# ---- servers -----------------------------------------------------------------------------------------------


def test_the_servers_first_model_is_taken(fake: Fake) -> None:
    assert served_model(fake.url + "/v1/", None) == "fake-1"
    assert Server(fake.url + "/v1/", "m").root == fake.url


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://", "ftp://host", "http://host:99999", "http://[::1", ""])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UsageError, match="no server's address"):
        Server(url, "m")


@pytest.mark.parametrize("key", ["clé", "a\nb"])
def test_a_key_that_fits_into_no_header(key: str) -> None:
    with pytest.raises(UsageError, match="API key"):
        Server("http://x", "m", key)


# ---- the verb ----------------------------------------------------------------------------------------------


def command(*arguments: str | Path) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.callback()
    def root(debug: bool = False) -> None:
        """As `fullpipe` itself has it."""

    app.command("load")(verb(load))
    return CliRunner().invoke(app, ["load", *map(str, arguments)])


def written(folder: Path, *texts: str) -> Path:
    path = folder / "some.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def test_the_verb_takes_each_level_in_turn(fake: Fake, tmp_path: Path) -> None:
    out = tmp_path / "new" / "load.json"
    done = command("--url", fake.url, "--prompts", written(tmp_path, "a", "b"), "--concurrency", "1,2",
                   "--num-prompts", 3, "--max-tokens", 7, "--extra-body", '{"top_p": 0.5}', "--json", out)
    assert done.exit_code == 0, done.output
    value = json.loads(out.read_text())
    results = [LoadResult.from_dict(one) for one in value["results"]]
    assert [(one.concurrency, len(one.samples), one.max_tokens) for one in results] == [(1, 3, 7), (2, 3, 7)]
    assert value["commit"] and value["machine"]["cores"]
    assert all(body["top_p"] == 0.5 for body in fake.bodies) and results[0].extra == {"top_p": 0.5}
    asked = [body["messages"][0]["content"] for body in fake.bodies]
    assert asked[:3] == ["[warm.0] a", "[1 at once.0] a", "[1 at once.1] b"] and len(set(asked)) == 7
    assert "1 at once" in done.output and "2 at once" in done.output


def test_the_verb_ends_with_1_when_a_request_failed(fake: Fake, tmp_path: Path) -> None:
    done = command("--url", fake.url, "--prompts", written(tmp_path, "a", "refuse"), "--rate", "100", "--warmup", "0",
                   "--same")
    assert done.exit_code == 1
    assert "1 status 429" in done.output and "some/2: status 429: the queue is full" in done.output
    assert [body["messages"][0]["content"] for body in fake.bodies] == ["a", "refuse"]


def test_a_warming_up_that_fails_ends_it_with_its_reason(fake: Fake, tmp_path: Path) -> None:
    done = command("--url", fake.url, "--prompts", written(tmp_path, "refuse", "a"), "--num-prompts", 5)
    assert done.exit_code == 1 and "warming up failed: status 429: the queue is full" in done.output
    assert len(fake.bodies) == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["--concurrency", "1", "--rate", "2"], "by concurrency or by rate"),
    (["--concurrency", "0"], "--concurrency takes whole numbers"),
    (["--extra-body", "[1]"], "--extra-body takes a JSON object"),
    (["--rate", "0"], "the rate above 0"),
    (["--url", "nowhere"], "no server's address"),
])
def test_the_verb_refuses(fake: Fake, arguments: list[str], message: str) -> None:
    done = command("--url", fake.url, *arguments)
    assert done.exit_code == 2 and message in done.output
    assert not fake.bodies


def test_the_key_is_sent_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "load.json"
    with serving(KEY) as fake:
        arguments = ["--url", fake.url, "--prompts", str(written(tmp_path, "a")), "--json", str(out)]
        refused = command(*arguments)
        assert refused.exit_code == 2 and "401" in refused.output
        monkeypatch.setattr(sys, "argv", ["fullpipe", "load", "--api-key", KEY])
        assert command(*arguments, "--api-key", KEY).exit_code == 0
    assert KEY not in out.read_text() and "--api-key '***'" in json.loads(out.read_text())["command"]


def test_without_httpx_the_extra_is_named(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    done = command("--url", fake.url)
    assert done.exit_code == MissingExtra.exit_code and "fullpipe[load]" in done.output


def test_ctrl_c_shows_what_there_is(fake: Fake, tmp_path: Path) -> None:
    fake.gate.clear()
    out, path = tmp_path / "load.json", written(tmp_path, "a", "wait", "b")
    code = ("import typer; from fullpipe.cli.load import load; from fullpipe.cli.verb import verb\n"
            "app = typer.Typer(pretty_exceptions_enable=False)\n"
            "@app.callback()\ndef root(debug: bool = False) -> None: ...\n"
            "app.command('load')(verb(load)); app()")
    process = subprocess.Popen([sys.executable, "-c", code, "load", "--url", fake.url, "--prompts", str(path),
                                "--warmup", "0", "--json", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: process.poll() is not None or (len(fake.bodies) == 2 and fake.at_once == 1))  # the second waits
    process.send_signal(signal.SIGINT)
    said, noted = process.communicate(timeout=30)
    assert process.returncode == 130, noted.decode()
    assert b"1 at once" in said and b"interrupted" in noted
    (result,) = (LoadResult.from_dict(one) for one in json.loads(out.read_text())["results"])
    assert result.interrupted and (len(result.samples), result.asked) == (1, 3)
