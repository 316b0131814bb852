"""An hour's worth of trouble in minutes: mixed requests, disconnects, slow readers, bad input and bursts.

    python -m fullpipe_lab.studies.serving.soak [--minutes 8] [--model smollm2-135m] [--draft ngram] [--stages 2]
        [--callers 8] [--seed 1] [--out FILE] [--log FILE]

Starts `fullpipe serve` with little room (4 run, 12 wait, 3072 cache slots), warms it up, notes what its processes hold,
and lets so many callers at it, each of which does one thing after another that is drawn from the seed. Every 15 s a
burst goes beyond what may wait. Every 2 s memory, open files and threads of each process are read, and what /metrics
says. Then everything has to drain. Faults, and exit code 1:

- a 5xx other than "503, Retry-After"; a good request that is not answered in full (429 with Retry-After is an answer);
  bad input that is not refused with a 4xx and a reason; an error in the server's log; a restart;
- something that still runs or waits when nobody asks;
- a cache slot that is not returned: at the end one request needs every slot there is, to the last one. Arenas that are
  kept for requests that begin alike give way to it, a slot that was lost does not, and then it waits for ever;
- memory that grows: of each process, the median RSS of the last third of the time may be 5% + 16 MB above that of the
  second third, no more; the first third is warming up;
- files and threads: no more open files than at the start, and no more threads but for the four that tokenise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from fullpipe.cli.console import print_table
from fullpipe.errors import FullpipeError
from fullpipe.prompts import bundled
from fullpipe.server.openai_stream import events
from fullpipe_lab.receipts import save_receipt, study_receipt
from fullpipe_lab.studies.serving.processes import (
    Ask,
    Footprint,
    add_common,
    ask,
    readiness,
    server_of,
    setup_of,
    station_names,
    workers,
)
from fullpipe_lab.studies.serving.servers import MODEL_NAME, Running, running

_SEQS, _QUEUE, _SLOTS = 4, 12, 3072
_LONGEST = _SLOTS - 128  # tokens of a request that takes every slot: so many are for guesses, and the server checks it
_SAMPLE_S, _BURST_S, _BURST = 2.0, 15.0, 30
_LIMIT_S = 240.0  # for one answer: they wait for each other
_SETTLE_S = 30.0  # until all is drained, and until closed connections are gone
_TOKENISERS = 4  # threads that the server starts when they are needed, and keeps
_GROWTH_SHARE, _GROWTH_BYTES = 0.05, 16 * 2**20
_STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
_PROBES = ("/health", "/ready", "/version", "/metrics", "/v1/models", "/")


# ---- what is asked ---------------------------------------------------------------------------------------


def good_ask(draw: random.Random) -> Ask:
    """Anything that the API takes, in modest lengths."""
    prompt = draw.choice(_PROMPTS)
    kind = draw.randrange(9)
    chat = kind not in (2, 6)
    body: dict[str, Any] = {"model": MODEL_NAME, "seed": draw.randrange(2**31), "max_tokens": draw.randint(1, 40),
                            "temperature": draw.choice((0, 0, 0.7, 1.0, 1.4))}
    match kind:
        case 1:
            body |= {"n": 2}
        case 2:
            body |= {"n": draw.choice((1, 3)), "logprobs": draw.randint(0, 5)}
        case 3:
            body |= {"stop": draw.choice([".", [" the", "\n"], "nothing like this"])}
        case 4:
            body |= {"logprobs": True, "top_logprobs": draw.randint(0, 8)}
        case 5:
            body |= {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1,
                     "logit_bias": {str(draw.randrange(1000)): -50}}
        case 6:
            prompt = " ".join([prompt, *draw.sample(_PROMPTS, 8)])  # long
        case 7:
            prompt = "Answer as an old sailor would, in short sentences and with much salt. " + prompt
        case 8:
            body |= {"top_p": 0.9, "top_k": 20, "min_p": 0.01}
    if draw.random() < 0.6:
        body |= _STREAM
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    return Ask(f"kind {kind}", chat, body)


_PROMPTS = [prompt.text for prompt in bundled()]


@dataclass(frozen=True, slots=True)
class Bad:
    """What must be refused with one of these statuses."""

    method: str
    path: str
    content: bytes
    statuses: tuple[int, ...] = (400,)
    kind: str = "application/json"


def bad_requests() -> list[Bad]:
    """One of each sort."""
    chat, text = "/v1/chat/completions", "/v1/completions"

    def body(**fields: Any) -> bytes:
        return json.dumps({"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hi"}]} | fields).encode()

    def plain(**fields: Any) -> bytes:
        return json.dumps({"model": MODEL_NAME, "prompt": "Hi"} | fields).encode()

    return [
        *(Bad("POST", chat, content) for content in (
            b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe\x00", b'{"model": NaN}', b"[" * 5000,
            body(messages=[]), body(messages="Hi"), body(messages=[{"role": "king", "content": "Hi"}]),
            body(messages=[{"role": "user", "content": None}]), body(temperature=-1), body(temperature="hot"),
            body(top_p=0), body(n=0), body(n=10**9), body(max_tokens=0), body(max_tokens=-5), body(stop=[""]),
            body(stop=["x"] * 17), body(logit_bias={"x": 1}), body(logit_bias={"1": 1000}), body(top_logprobs=3),
            body(tools=[{"type": "function"}]), body(response_format={"type": "rhyme"}), body(wish="rain"),
            body(stream_options={"include_usage": True}), body(seed=2**70),
            body(messages=[{"role": "user", "content": "word " * 6000}]))),
        *(Bad("POST", text, content) for content in (
            plain(prompt=[]), plain(prompt=[-1]), plain(prompt=[10**8]), plain(prompt=""), plain(prompt={"a": 1}),
            plain(logprobs=21), plain(n=7, best_of=6), plain(suffix="end"), plain(max_tokens=0),
            plain(prompt=list(range(100, 4090)), max_tokens=100))),
        Bad("POST", chat, body(model="nobody"), (404,)),
        Bad("POST", chat, b"a=b", (415,), "application/x-www-form-urlencoded"),
        Bad("POST", text, b'{"prompt": "' + b"x" * (5 * 2**20) + b'"}', (413,)),
        Bad("GET", chat, b"", (405,)), Bad("DELETE", "/v1/models", b"", (405,)),
        Bad("GET", "/v1/models/nobody", b"", (404,)), Bad("POST", "/v1/embeddings", b"{}", (404,)),
        Bad("GET", "/..%2f..%2fetc/passwd", b"", (404,)),
    ]


_RAW = (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 50,
        b"POST /v1/completions",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{",
        b"GET /ready HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 3000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n")


# ---- the callers -----------------------------------------------------------------------------------------


@dataclass
class Soak:
    """A run's state. counts: by what was done and how it ended."""

    server: Running
    client: httpx.AsyncClient
    num_stages: int
    draw: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.server.url

    def note(self, what: str, outcome: str, fault: str = "") -> None:
        self.counts[f"{what}: {outcome}"] += 1
        if fault:
            self.faults.append(f"{what}: {fault}"[:600])
            say(f"    FAULT {self.faults[-1]}")


def status_fault(status: int, retry_after: str | None) -> str:
    """Why this status is never right, "" where it may be."""
    if status >= 500 and not (status == 503 and retry_after):
        return f"status {status}"
    if status in (429, 503) and not retry_after:
        return f"status {status} without Retry-After"
    return ""


async def do_good(soak: Soak) -> None:
    """A request that is read to its end."""
    await _ask_well(soak, good_ask(soak.draw), "whole")


async def _ask_well(soak: Soak, what: Ask, label: str) -> bool:
    reply = await ask(soak.client, soak.url, what, _LIMIT_S)
    turned_away = reply.status in (429, 503) and reply.retry_after is not None
    outcome = str(reply.status) if turned_away or not reply.error else "failed"
    soak.note(label, outcome, reply.error if not turned_away else "")
    if turned_away:
        await asyncio.sleep(1.0)  # as Retry-After says
    return not reply.error


async def do_leave(soak: Soak) -> None:
    """The caller goes: before the answer has begun, or in its midst."""
    what, stay = good_ask(soak.draw), soak.draw.choice((0.02, 0.2, 1.0, 3.0)) * soak.draw.random()
    what.body["max_tokens"] = 200
    with suppress(TimeoutError):
        async with asyncio.timeout(stay):
            await ask(soak.client, soak.url, what, _LIMIT_S)
    soak.note("left", "before the end")


async def do_read_slowly(soak: Soak) -> None:
    """A piece, a pause, a piece; one in two leaves after a while."""
    what = good_ask(soak.draw)
    what.body.update(_STREAM, max_tokens=60)
    most = soak.draw.choice((5, 1000))
    async with soak.client.stream("POST", soak.url + what.path, json=what.body, timeout=_LIMIT_S) as response:
        if response.status_code != 200:
            soak.note("slow", str(response.status_code), status_fault(response.status_code,
                                                                response.headers.get("retry-after")))
            return
        number = 0
        async for data in events(response.aiter_raw()):
            number += 1
            if b'"error"' in data[:12]:
                soak.note("slow", "error", data.decode(errors="replace"))
            if number >= most:
                break
            await asyncio.sleep(0.3 * soak.draw.random())
    soak.note("slow", "left" if number >= most else "whole")


async def do_badly(soak: Soak) -> None:
    one = soak.draw.choice(_BAD)
    try:
        response = await soak.client.request(one.method, soak.url + one.path, content=one.content,
                                             headers={"content-type": one.kind}, timeout=60)
    except (httpx.ReadError, httpx.WriteError):
        if 413 not in one.statuses:
            raise
        soak.note("bad input", "closed while the body was sent")  # refused at its head, and the rest is not read
        return
    fault = status_fault(response.status_code, response.headers.get("retry-after"))
    if not fault and response.status_code not in one.statuses:
        fault = f"answered {response.status_code}, not {one.statuses}"
    if not fault:
        try:
            fault = "" if response.json()["error"]["message"] else "gives no reason"
        except (ValueError, LookupError, TypeError):
            fault = f"has another shape: {response.text[:200]}"
    what = f"{one.method} {one.path} {one.content[:80]!r} "
    soak.note("bad input", str(response.status_code), what + fault if fault else "")


_BAD = bad_requests()


async def do_rawly(soak: Soak) -> None:
    """Bytes that are no request, or half of one; then the connection is closed."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(soak.url).port)
            try:
                writer.write(soak.draw.choice(_RAW))
                await writer.drain()
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.3):
                        await reader.read(2000)
            finally:
                writer.close()
    soak.note("raw bytes", "sent")


async def do_look(soak: Soak) -> None:
    path = soak.draw.choice(_PROBES)
    response = await soak.client.get(soak.url + path, timeout=60)
    soak.note("looks", str(response.status_code),
              "" if response.status_code == 200 else f"GET {path}: {response.status_code} {response.text[:200]}")


_DEEDS: tuple[tuple[int, Callable[[Soak], Awaitable[None]]], ...] = (
    (10, do_good), (6, do_leave), (3, do_read_slowly), (8, do_badly), (3, do_rawly), (3, do_look))


async def call(soak: Soak, until: float) -> None:
    """One deed after another."""
    weights, deeds = zip(*_DEEDS)
    while time.monotonic() < until:
        deed = soak.draw.choices(deeds, weights)[0]
        try:
            await deed(soak)
        except (httpx.HTTPError, TimeoutError) as error:
            soak.note(deed.__name__.removeprefix("do_"), "failed", f"{type(error).__name__}: {error}")


async def burst_often(soak: Soak, until: float) -> None:
    """More at once than may run and wait."""
    while time.monotonic() + _BURST_S < until:
        await asyncio.sleep(_BURST_S)
        what = [Ask("burst", True, {"model": MODEL_NAME, "max_tokens": 4, "temperature": 0,
                                    "messages": [{"role": "user", "content": soak.draw.choice(_PROMPTS)}]})
                for _ in range(_BURST)]
        await asyncio.gather(*(_ask_well(soak, one, "burst") for one in what))


# ---- what the processes hold -----------------------------------------------------------------------------


def footprints(soak: Soak) -> dict[str, Footprint]:
    there = {"server": psutil.Process(soak.server.process.pid), **workers(soak.server.process.pid, soak.num_stages)}
    found = {}
    for name, process in there.items():
        with suppress(psutil.Error):
            found[name] = Footprint.of(process)
    return found


async def gauges(soak: Soak) -> dict[str, float]:
    text = (await soak.client.get(soak.url + "/metrics", timeout=60)).raise_for_status().text
    return {sample.name.removeprefix("fullpipe_"): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples
            if sample.name.removeprefix("fullpipe_") in _GAUGES}


async def sample_often(soak: Soak, began: float) -> None:
    """For ever."""
    while True:
        row: dict[str, Any] = {"at_s": round(time.monotonic() - began, 3)}
        row |= {name: asdict(one) for name, one in (await asyncio.to_thread(footprints, soak)).items()}
        with suppress(httpx.HTTPError):
            row |= await gauges(soak)
        soak.samples.append(row)
        if len(soak.samples) % 10 == 0:
            say(_line(row, soak))
        await asyncio.sleep(_SAMPLE_S)


def growth(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the second and of the last third of what was read at even intervals. Raises ValueError for fewer than
    six."""
    if len(values) < 6:
        raise ValueError("too few samples")
    third = len(values) // 3
    return median(values[third:-third]), median(values[-third:])


def memory_fault(name: str, rss: Sequence[float]) -> str:
    """Why this is not flat, "" if it is."""
    middle, last = growth(rss)
    most = middle * (1 + _GROWTH_SHARE) + _GROWTH_BYTES
    return "" if last <= most else (f"memory of {name} grows: {last / 2**20:.1f} MB in the last third, "
                                    f"{middle / 2**20:.1f} MB in the second")


def leftover_faults(before: dict[str, Footprint], after: dict[str, Footprint]) -> list[str]:
    """Open files and threads that are more than they were."""
    faults = [f"{name} is gone" for name in before if name not in after]
    for name in before.keys() & after.keys():
        allowed = _TOKENISERS if name == "server" else 0
        if after[name].fds > before[name].fds:
            faults.append(f"{name} has {after[name].fds} open files, {before[name].fds} at the start")
        if after[name].threads > before[name].threads + allowed:
            faults.append(f"{name} has {after[name].threads} threads, {before[name].threads} at the start")
    return sorted(faults)


# ---- the run ---------------------------------------------------------------------------------------------


async def run(asked: argparse.Namespace, server: Running) -> dict[str, Any]:
    """The results; faults and samples among them."""
    soak = Soak(server, _client(), asked.stages, random.Random(asked.seed))
    say("warming up")
    await _warm_up(soak)
    await soak.client.aclose()
    before = await _settled(soak, None)
    soak.client = _client()
    say(f"{asked.callers} callers for {asked.minutes:g} minutes")
    began = time.monotonic()
    sampler = asyncio.create_task(sample_often(soak, began))
    until = began + 60 * asked.minutes
    await asyncio.gather(burst_often(soak, until), *(call(soak, until) for _ in range(asked.callers)))
    sampler.cancel()
    say(f"nobody asks any more; {sum(soak.counts.values())} things were done")
    drained = await _check_drained(soak)
    await _check_slots(soak)
    await soak.client.aclose()
    after = await _settled(soak, before)
    soak.faults += leftover_faults(before, after)
    medians = _check_memory(soak, [*before])
    return {"minutes": asked.minutes, "counts": dict(sorted(soak.counts.items())), "drained": drained,
            "processes": {name: {"start": asdict(before[name]), "end": asdict(after[name]) if name in after else None,
                                 "rss_second_third": medians[name][0], "rss_last_third": medians[name][1]}
                          for name in before if name in medians},
            "faults": soak.faults, "samples": soak.samples}


async def _warm_up(soak: Soak) -> None:
    """Every kind of request, a few at a time, and once as many tokenisers as there may be."""
    few = asyncio.Semaphore(3)

    async def one(number: int) -> None:
        async with few:
            await _ask_well(soak, good_ask(random.Random(number)), "warm-up")

    await asyncio.gather(*(one(number) for number in range(18)))
    await asyncio.gather(*(do_badly(soak) for _ in range(8)))


def _client() -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)


async def _settled(soak: Soak, goal: dict[str, Footprint] | None) -> dict[str, Footprint]:
    """What the processes hold when connections have been closed; without a goal, after a few seconds."""
    until = time.monotonic() + (_SETTLE_S if goal else 3.0)
    while True:
        await asyncio.sleep(0.5)
        found = footprints(soak)
        if time.monotonic() > until or (goal and not leftover_faults(goal, found)):
            return found


async def _check_drained(soak: Soak) -> dict[str, float]:
    """Within a while nothing runs, nothing waits, and nothing has been started anew."""
    until = time.monotonic() + _SETTLE_S
    while (now := await readiness(soak.client, soak.url)).running or now.waiting:
        if time.monotonic() > until:
            soak.faults.append(f"nobody asks, and {now.running} run and {now.waiting} wait after {_SETTLE_S:g} s")
            break
        await asyncio.sleep(0.1)
    if now.state != "ready" or now.restarts:
        soak.faults.append(f"the service is {now.state} after {now.restarts} restarts: {now.last_failure}")
    return await gauges(soak)


async def _check_slots(soak: Soak) -> None:
    """Ask for every slot there is."""
    def asking(prompt: int) -> Ask:
        return Ask("all slots", False, {"model": MODEL_NAME, "prompt": [100 + place % 900 for place in range(prompt)],
                                        "max_tokens": 8, "ignore_eos": True, "temperature": 0})

    exact = _LONGEST - 8
    one_more = await ask(soak.client, soak.url, asking(exact + 1), 60)
    if one_more.status != 400:
        soak.faults.append(f"one slot more than there are is not refused: {one_more.error or one_more.status}")
    began = time.monotonic()
    reply = await ask(soak.client, soak.url, asking(exact), _LIMIT_S)
    say(f"a request for all {_SLOTS} slots: {reply.error or reply.status} after {time.monotonic() - began:.1f} s")
    soak.note("all slots", str(reply.status), f"slots are missing: {reply.error}" if reply.error else "")


def _check_memory(soak: Soak, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    medians = {}
    for name in names:
        values = [row[name]["rss"] for row in soak.samples if name in row]
        try:
            medians[name] = growth(values)
        except ValueError:
            soak.faults.append(f"{name} was seen only {len(values)} times")
            continue
        if fault := memory_fault(name, values):
            soak.faults.append(fault)
    return medians


def log_faults(log: str) -> list[str]:
    """Errors in the server's log; none is expected."""
    lines = [line for line in log.splitlines() if " ERROR " in line or line.startswith("Traceback")]
    return [f"the log has {len(lines)} errors, the first: {lines[0][:300]}"] if lines else []


# ---- what is told ----------------------------------------------------------------------------------------


def _mb(size: float) -> str:
    return f"{size / 2**20:.1f} MB"


def _line(row: dict[str, Any], soak: Soak) -> str:
    held = ", ".join(f"{name} {row[name]['rss'] / 2**20:.0f} MB {row[name]['fds']} files"
                     for name in ("server", *station_names(soak.num_stages)) if name in row)
    return (f"  {row['at_s']:5.0f} s: {held}; {row.get('num_requests_running', 0):.0f} running, "
            f"{row.get('num_requests_waiting', 0):.0f} waiting, cache {row.get('kv_cache_usage_perc', 0):.0%}; "
            f"{sum(soak.counts.values())} done, {len(soak.faults)} faults")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    if not 0.5 <= asked.minutes <= 10:
        sys.exit("error: --minutes must be from 0.5 to 10")
    log = asked.log or Path(tempfile.mkdtemp(prefix="fullpipe-soak-")) / "server.log"
    log.unlink(missing_ok=True)
    options = ("--max-waiting", str(_QUEUE), "--kv-cache-tokens", str(_SLOTS))
    say(f"starting {asked.model}, draft {asked.draft}, in {asked.stages} stages; its log is {log}")
    try:
        with running(server_of(asked.draft, asked.stages, options), setup_of(asked.model, _LONGEST, _SEQS),
                     log) as server:
            results = asyncio.run(run(asked, server))
    except FullpipeError as error:
        sys.exit(f"error: {error}")
    results["faults"] += log_faults(log.read_text(errors="replace"))
    samples = results.pop("samples")
    print_table(["", "times"], [[name, str(number)] for name, number in results["counts"].items()])
    print_table(["process", "RSS: second third", "last third"],
                [[name, _mb(one["rss_second_third"]), _mb(one["rss_last_third"])]
                 for name, one in results["processes"].items()])
    if asked.out:
        about = {"server": server.command, "load_s": server.load_s}
        save_receipt(study_receipt("serving_soak", results | about, samples), asked.out)
        say(f"wrote {asked.out}")
    for fault in results["faults"]:
        print(f"FAULT {fault}")
    sys.exit(1 if results["faults"] else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    add_common(parser)
    parser.add_argument("--callers", type=int, default=8)
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must be ended on the way out
    main()
