"""Stage and draft processes of a real server are killed at random moments under load; every text must come out as if
nothing had happened.

    python -m fullpipe_lab.studies.serving.kills [--kills 100] [--model smollm2-135m] [--draft ngram] [--stages 2]
        [--clients 6] [--seed 1] [--hangs 0.1] [--while-rebuilding 0.15] [--timeout S] [--out FILE] [--log FILE]

Starts `fullpipe serve` in fp32 and asks a fixed set of requests: greedy and sampled, streamed and not, of several
lengths, some that begin alike. What it answers before the first kill is what it must say ever after. Then so many
clients ask, one request each at any time, while processes of the server are ended by SIGKILL or stopped by SIGSTOP (a
hang): which, how and when is drawn from the seed. Some are hit while the pipeline is being built anew.

A request that fails, is cut off, or answers anything else is a fault of the run; so is a victim that the log or
/metrics does not name, and a restart too many. Only "503, Retry-After" before an answer has begun may be asked again.
Exits with 1 on any fault. --out gets the receipt: every strike and every request.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import re
import signal
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx
import psutil

from fullpipe.cli.console import print_table
from fullpipe.errors import FullpipeError
from fullpipe.prompts import bundled
from fullpipe.server.load import Spread
from fullpipe_lab.receipts import save_receipt, study_receipt
from fullpipe_lab.studies.serving.processes import (
    Ask,
    Readiness,
    Reply,
    add_common,
    ask,
    readiness,
    restarts_by_station,
    server_of,
    setup_of,
    station_names,
    workers,
)
from fullpipe_lab.studies.serving.servers import MODEL_NAME, Running, running

T = TypeVar("T")
Moment = Literal["serving", "rebuilding"]

_MAX_LEN, _MAX_SEQS = 1024, 4  # fewer than clients: some wait for admission when it happens
_LIMIT_S = 300.0  # for one answer, rebuilding included
_NOTICE_S, _REBUILD_S = 90.0, 180.0  # at most
_LOOK_S = 0.02  # between looks at /ready
_PAUSE_S = (0.1, 5.0)  # of undisturbed service before the next strike
_REST_S = (2.5, 5.0)  # the same where the strikes before came early: all who run get on meanwhile
_MOST_EARLY = 2
_IN_REBUILD_S = (0.0, 3.0)  # after the victim's process is there
_COMMON = ("You are a careful assistant. Answer in complete sentences, name your sources where you have any, and say "
           "so when you do not know. Keep to the question that was asked, and be brief. ")


# ---- what is asked ---------------------------------------------------------------------------------------

_STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
_GREEDY: dict[str, Any] = {"temperature": 0}
# Fields beside model, prompt and seed; "chat" and "common" are ours. Cycled over the prompts.
_KINDS: tuple[dict[str, Any], ...] = (
    {"chat": True, "max_tokens": 96, **_GREEDY, **_STREAM},
    {"chat": True, "max_tokens": 160, "temperature": 1.0, "common": True, **_STREAM},
    {"chat": False, "max_tokens": 24, **_GREEDY},
    {"chat": True, "max_tokens": 64, "temperature": 0.8, "top_p": 0.9, **_STREAM},
    {"chat": True, "max_tokens": 48, "common": True, **_GREEDY},
    {"chat": False, "max_tokens": 72, "temperature": 0.7, "n": 2, **_STREAM},
    {"chat": True, "max_tokens": 128, "repetition_penalty": 1.2, **_GREEDY, **_STREAM},
    {"chat": True, "max_tokens": 40, "temperature": 1.3, "top_k": 40, "common": True, "logprobs": True,
     "top_logprobs": 2, **_STREAM},
    {"chat": False, "max_tokens": 80, "temperature": 1.0, "stop": ["\n\n", "."], **_STREAM},
    {"chat": True, "max_tokens": 8, **_GREEDY, **_STREAM},
)


def asks(number: int) -> list[Ask]:
    """The first so many requests; the same at any time."""
    made = []
    for place, (prompt, kind) in enumerate(zip(islice(cycle(bundled()), number), cycle(_KINDS))):
        body = {"model": MODEL_NAME, "seed": 1000 + place,
                **{key: value for key, value in kind.items() if key not in ("chat", "common")}}
        text = (_COMMON if kind.get("common") else "") + prompt.text
        body |= {"messages": [{"role": "user", "content": text}]} if kind["chat"] else {"prompt": text}
        made.append(Ask(f"{place}/{prompt.id}", kind["chat"], body))
    return made


# ---- what is done to the server --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Strike:
    """victim: a station's name. when: with the pipeline up, or while it is built anew after the strike before. pause_s:
    from then on (rebuilding: from when the victim's process is there)."""

    number: int
    victim: str
    signal: Literal["SIGKILL", "SIGSTOP"]
    when: Moment
    pause_s: float


def plan(kills: int, names: Sequence[str], *, hangs: float, rebuilding: float, seed: int) -> list[Strike]:
    """hangs, rebuilding: shares. Where they are not 0 the second strike is a hang, and the third comes while
    rebuilding, so that a short run has both. Every station comes once in each round of all, in another order.

    Two promises of the server are not on trial and bound how close strikes come: who fails five times without a token
    in between says so and takes nothing, and a request that ran at three failures without getting on is ended. So after
    two strikes that may have left no time for a token the next one lets the service run for a while. And nothing is
    stopped while it is started: that is noticed only when the time to start is over.
    """
    draw = random.Random(seed)
    strikes: list[Strike] = []
    bag: list[str] = []
    early = 0  # in a row
    for number in range(kills):
        bag = bag or draw.sample(names, len(names))
        rest = early >= _MOST_EARLY
        again = (number == 2 and rebuilding > 0) or (number > 2 and not rest and draw.random() < rebuilding)
        pause = draw.uniform(*(_IN_REBUILD_S if again else _REST_S if rest else _PAUSE_S))
        early = early + 1 if again or pause < _REST_S[0] else 0
        hang = not again and (draw.random() < hangs or (number == 1 and hangs > 0))
        strikes.append(Strike(number, bag.pop(), "SIGSTOP" if hang else "SIGKILL", "rebuilding" if again else "serving",
                              pause))
    return strikes


@dataclass(slots=True)
class Blow:
    """A strike as it went. Seconds are since the signal was sent, or None.

    state: of the service, as it said just before. in_flight, begun: requests that were under way at the clients, and
    those of them whose text had begun to come (streamed ones). noticed_s: until /ready counted the failure;
    unready_s: until the last look at which it took no requests; ready_s: until it took them again, and token_s: until
    the first text came after that (None: struck again before, or only answers in one piece were under way). named: by
    whom it was found in /metrics.
    """

    number: int
    victim: str
    signal: str
    when: Moment
    state: str
    at_s: float
    in_flight: int
    begun: int
    noticed_s: float | None = None
    unready_s: float | None = None
    ready_s: float | None = None
    token_s: float | None = None
    named: str = ""
    reason: str = ""


@dataclass(slots=True)
class Sample:
    """A request under load. Seconds since the load began. strikes: while it was under way; retries: of refusals."""

    ask: str
    sent_s: float
    end_s: float
    strikes: int
    retries: int
    tokens: int | None
    fault: str


@dataclass(slots=True)
class Pending:
    """A request that is under way at a client."""

    sent: float
    begun: bool = False


@dataclass
class Trial:
    """A run's state. expected: of each ask, what it must answer."""

    server: Running
    client: httpx.AsyncClient
    num_stages: int
    expected: dict[str, Reply]
    started: float = field(default_factory=time.monotonic)
    pending: dict[int, Pending] = field(default_factory=dict)
    texts_at: list[float] = field(default_factory=list)
    struck_at: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    blows: list[Blow] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    old: set[int] = field(default_factory=set)  # pids of the pipeline that was struck last

    def now(self) -> float:
        return time.monotonic() - self.started

    async def look(self) -> Readiness:
        if self.server.process.poll() is not None:
            raise FullpipeError(f"the server has ended with code {self.server.process.returncode}")
        return await readiness(self.client, self.server.url)


# ---- the clients -----------------------------------------------------------------------------------------


async def keep_asking(trial: Trial, own: int, what: Iterable[Ask], enough: asyncio.Event) -> None:
    """One request after another until it is enough; the last one is waited for."""
    for one in what:
        if enough.is_set():
            return
        await _one(trial, own, one)


async def _one(trial: Trial, own: int, what: Ask) -> None:
    here = trial.pending[own] = Pending(time.monotonic())
    retries = 0

    def on_text(now: float) -> None:
        here.begun = True
        trial.texts_at.append(now)

    while True:
        reply = await ask(trial.client, trial.server.url, what, _LIMIT_S, on_text)
        if not reply.turned_away or retries >= 20:
            break
        retries += 1
        await asyncio.sleep(min(float(reply.retry_after or 1), 5.0))
    del trial.pending[own]
    fault = reply.error or reply.differs(trial.expected[what.name])
    end = time.monotonic()
    trial.samples.append(Sample(what.name, here.sent - trial.started, end - trial.started,
                                sum(here.sent < at < end for at in trial.struck_at), retries, reply.tokens, fault))
    if fault:
        trial.faults.append(f"request {what.name}: {fault}")
        say(f"    FAULT {trial.faults[-1][:500]}")


async def undisturbed(trial: Trial, what: Sequence[Ask], clients: int) -> None:
    """Every ask once, with as many under way as later. Raises FullpipeError where one fails with nothing done to it."""
    left = iter(what)

    async def worker() -> None:
        for one in left:
            reply = await ask(trial.client, trial.server.url, one, _LIMIT_S)
            if reply.error:
                raise FullpipeError(f"{one.name} fails on a server to which nothing was done: {reply.error}")
            trial.expected[one.name] = reply

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(worker())


# ---- the killer ------------------------------------------------------------------------------------------


async def strike_all(trial: Trial, strikes: Sequence[Strike]) -> None:
    """Raises FullpipeError when the server does not notice, or does not come back."""
    for strike, after in zip(strikes, [*strikes[1:], None]):
        victim = await _victim(trial, strike)
        blow = await _hit(trial, strike, victim)
        if after is None or after.when == "serving":
            await _await_service(trial, blow)
        say(_line(blow))


async def _victim(trial: Trial, strike: Strike) -> psutil.Process:
    """Its process at the right time. While rebuilding it has to be started first, when those of the old pipeline are
    gone."""
    if strike.when == "serving":
        await asyncio.sleep(strike.pause_s)
    there = await _until(lambda: _started(trial, strike), f"no process of {strike.victim}", _REBUILD_S)
    if strike.when == "rebuilding":
        await asyncio.sleep(strike.pause_s)
    return there


def _started(trial: Trial, strike: Strike) -> psutil.Process | None:
    there = workers(trial.server.process.pid, trial.num_stages)
    if strike.when == "rebuilding" and trial.old & _pids(there):
        return None
    return there.get(strike.victim)


def _pids(processes: dict[str, psutil.Process]) -> set[int]:
    return {process.pid for process in processes.values()}


async def _until(found: Callable[[], T | None], what: str, limit_s: float) -> T:
    """Raises FullpipeError, `what` and how long, when the time is over."""
    until = time.monotonic() + limit_s
    while (value := found()) is None:
        if time.monotonic() > until:
            raise FullpipeError(f"{what} after {limit_s:g} s")
        await asyncio.sleep(_LOOK_S)
    return value


async def _hit(trial: Trial, strike: Strike, victim: psutil.Process) -> Blow:
    """Send the signal and wait until the failure is counted."""
    before, counted = await trial.look(), await restarts_by_station(trial.client, trial.server.url)
    trial.old = _pids(workers(trial.server.process.pid, trial.num_stages))
    struck = time.monotonic()
    victim.send_signal(getattr(signal, strike.signal))
    trial.struck_at.append(struck)
    blow = Blow(strike.number, strike.victim, strike.signal, strike.when, before.state, struck - trial.started,
                len(trial.pending), sum(one.begun for one in trial.pending.values()))
    trial.blows.append(blow)
    while (now := await trial.look()).restarts == before.restarts:
        if time.monotonic() - struck > _NOTICE_S:
            raise FullpipeError(f"{strike.signal} of {strike.victim} is not noticed after {_NOTICE_S:g} s")
        await asyncio.sleep(_LOOK_S)
    blow.noticed_s, blow.reason = time.monotonic() - struck, now.last_failure.splitlines()[0]
    trial.old |= _pids(workers(trial.server.process.pid, trial.num_stages))
    grown = Counter(await restarts_by_station(trial.client, trial.server.url)) - Counter(counted)
    blow.named = ", ".join(sorted(grown.elements()))
    if blow.named != strike.victim:
        trial.faults.append(f"strike {strike.number}: {strike.signal} of {strike.victim}, and /metrics names "
                            f"{blow.named or 'nobody'}: {blow.reason}")
        say(f"    FAULT {trial.faults[-1]}")
    return blow


async def _await_service(trial: Trial, blow: Blow) -> None:
    """Until requests are taken again."""
    struck = trial.started + blow.at_s
    blow.unready_s = blow.noticed_s
    while (await trial.look()).status != 200:
        blow.unready_s = time.monotonic() - struck
        if blow.unready_s > _REBUILD_S:
            raise FullpipeError(f"the server is not ready {_REBUILD_S:g} s after {blow.victim} was struck")
        await asyncio.sleep(_LOOK_S)
    blow.ready_s = time.monotonic() - struck


def note_first_texts(blows: Sequence[Blow], texts_at: Sequence[float]) -> None:
    """token_s of each blow, from when text came to any client (seconds on the blows' clock, rising)."""
    ends = [*(blow.at_s for blow in blows[1:]), math.inf]
    for blow, end in zip(blows, ends):
        if blow.unready_s is not None:
            place = bisect_right(texts_at, blow.at_s + blow.unready_s)
            if place < len(texts_at) and texts_at[place] < end:
                blow.token_s = texts_at[place] - blow.at_s


# ---- the run ---------------------------------------------------------------------------------------------


async def run(asked: argparse.Namespace, server: Running) -> Trial:
    """All of it. What goes wrong is in the trial's faults."""
    what = asks(asked.requests)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
        trial = Trial(server, client, asked.stages, {})
        say(f"asking {len(what)} requests of a server to which nothing is done")
        try:
            await undisturbed(trial, what, asked.clients)
        except* FullpipeError as group:
            raise FullpipeError(str(group.exceptions[0])) from None
        say(f"{sum(reply.tokens or 0 for reply in trial.expected.values())} tokens in {trial.now():.0f} s; now "
            f"{asked.kills} kills under {asked.clients} clients")
        trial.started = time.monotonic()
        await _under_load(trial, what, asked)
        return trial


async def _under_load(trial: Trial, what: Sequence[Ask], asked: argparse.Namespace) -> None:
    strikes = plan(asked.kills, station_names(asked.stages), hangs=asked.hangs, rebuilding=asked.while_rebuilding,
                   seed=asked.seed)
    enough = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for own in range(asked.clients):
            order = random.Random(1000 * asked.seed + own)
            endless = (order.choice(what) for _ in count())
            group.create_task(keep_asking(trial, own, endless, enough))
        try:
            await strike_all(trial, strikes)
        except (FullpipeError, httpx.HTTPError, psutil.Error) as error:
            trial.faults.append(f"the run ended early: {type(error).__name__}: {error}")
        enough.set()
    note_first_texts(trial.blows, [at - trial.started for at in trial.texts_at])
    await _check_end(trial)


async def _check_end(trial: Trial) -> None:
    """Nothing is left over, and there were as many restarts as strikes, of those that were struck."""
    try:
        last, counted = await trial.look(), await restarts_by_station(trial.client, trial.server.url)
    except (FullpipeError, httpx.HTTPError) as error:
        trial.faults.append(f"at the end: {error}")
        return
    if (last.state, last.running, last.waiting) != ("ready", 0, 0):
        trial.faults.append(f"at the end the server is {last.state} with {last.running} running and {last.waiting} "
                            "waiting")
    struck = Counter(blow.victim for blow in trial.blows)
    if counted != struck:
        trial.faults.append(f"/metrics counts restarts {counted}, and struck were {dict(struck)}")


def check_log(trial: Trial, log: str) -> None:
    """Every failure is a line that names the station."""
    said = Counter(re.findall(r"ERROR fullpipe\.supervision: (stage \d+|draft) failed: ", log))
    struck = Counter(blow.victim for blow in trial.blows)
    if said != struck:
        trial.faults.append(f"the log names {dict(said)}, and struck were {dict(struck)}")


# ---- what is told ----------------------------------------------------------------------------------------


def results_of(trial: Trial) -> dict[str, Any]:
    def spread(name: str, sent: str) -> dict[str, Any] | None:
        values = [getattr(blow, name) for blow in trial.blows if blow.signal == sent]
        found = Spread.of(values)
        return asdict(found) | {"max": max(value for value in values if value is not None)} if found else None

    struck = [sample for sample in trial.samples if sample.strikes]
    return {
        "strikes": len(trial.blows),
        "by_station": dict(Counter(f"{blow.victim} {blow.signal}" for blow in trial.blows)),
        "while_rebuilding": sum(blow.state != "ready" for blow in trial.blows),
        "requests": len(trial.samples), "tokens": sum(sample.tokens or 0 for sample in trial.samples),
        "struck_requests": len(struck), "most_strikes_of_a_request": max((one.strikes for one in struck), default=0),
        "retried_503": sum(sample.retries for sample in trial.samples),
        "different_or_failed": sum(bool(sample.fault) for sample in trial.samples),
        "in_flight": sum(blow.in_flight for blow in trial.blows),
        "begun_in_flight": sum(blow.begun for blow in trial.blows),
        **{f"{name}_{sent}": spread(name, sent) for sent in ("SIGKILL", "SIGSTOP")
           for name in ("noticed_s", "ready_s", "token_s")},
        "faults": trial.faults,
    }


def _line(blow: Blow) -> str:
    ready = f"ready after {blow.ready_s:5.2f} s" if blow.ready_s is not None else "struck again before it was ready"
    return (f"{blow.number + 1:4d}  {blow.signal} {blow.victim:8s} ({blow.state}), {blow.in_flight} in flight, "
            f"{blow.begun} begun; noticed after {blow.noticed_s:5.2f} s, {ready}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    log = asked.log or Path(tempfile.mkdtemp(prefix="fullpipe-kills-")) / "server.log"
    options = () if asked.timeout is None else ("--timeout", str(asked.timeout))
    log.unlink(missing_ok=True)
    say(f"starting {asked.model}, draft {asked.draft}, in {asked.stages} stages; its log is {log}")
    try:
        with running(server_of(asked.draft, asked.stages, options), setup_of(asked.model, _MAX_LEN, _MAX_SEQS),
                     log) as server:
            trial = asyncio.run(run(asked, server))
    except FullpipeError as error:
        sys.exit(f"error: {error}")
    check_log(trial, log.read_text(errors="replace"))
    results = results_of(trial)
    print_table(["", ""], [[name, str(value)] for name, value in results.items() if name != "faults"])
    if asked.out:
        samples = [{"strike": asdict(blow)} for blow in trial.blows] + [asdict(one) for one in trial.samples]
        about = {"server": server.command, "load_s": server.load_s}
        save_receipt(study_receipt("serving_kills", results | about, samples), asked.out)
        say(f"wrote {asked.out}")
    for fault in trial.faults:
        print(f"FAULT {fault[:1000]}")
    sys.exit(1 if trial.faults else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    add_common(parser)
    parser.add_argument("--clients", type=int, default=6, help="each has one request under way at any time")
    parser.add_argument("--requests", type=int, default=20, help="different ones")
    parser.add_argument("--hangs", type=float, default=0.1, help="share of strikes that stop a process")
    parser.add_argument("--while-rebuilding", type=float, default=0.15, help="share of strikes that do not wait")
    parser.add_argument("--timeout", type=float, help="for `fullpipe serve`: seconds after which a station hangs")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must be ended on the way out
    main()
