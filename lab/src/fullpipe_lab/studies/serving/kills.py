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
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx
import psutil

from fullpipe.cli.console import print_table
from fullpipe.errors import FullpipeError
from fullpipe.server.load import Spread
from fullpipe_lab.receipts import save_receipt, study_receipt
from fullpipe_lab.studies.serving.processes import (
    Ask,
    Readiness,
    add_common,
    readiness,
    restarts_by_station,
    server_of,
    setup_of,
    station_names,
    workers,
)
from fullpipe_lab.studies.serving.servers import Running, running
from fullpipe_lab.studies.serving.under_load import Load, asks, keep_asking, say, undisturbed

T = TypeVar("T")
Moment = Literal["serving", "rebuilding"]

_MAX_LEN, _MAX_SEQS = 1024, 4  # fewer than clients: some wait for admission when it happens
_NOTICE_S, _REBUILD_S = 90.0, 180.0  # at most
_LOOK_S = 0.02  # between looks at /ready
_PAUSE_S = (0.1, 5.0)  # of undisturbed service before the next strike
_REST_S = (2.5, 5.0)  # the same where the strikes before came early: all who run get on meanwhile
_MOST_EARLY = 2
_IN_REBUILD_S = (0.0, 3.0)  # after the victim's process is there


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


@dataclass
class Trial(Load):
    """A run's state. old: pids of the pipeline that was struck last."""

    _: KW_ONLY
    server: Running
    num_stages: int
    blows: list[Blow] = field(default_factory=list)
    old: set[int] = field(default_factory=set)

    async def look(self) -> Readiness:
        if self.server.process.poll() is not None:
            raise FullpipeError(f"the server has ended with code {self.server.process.returncode}")
        return await readiness(self.client, self.server.url)


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
        trial.fault(f"strike {strike.number}: {strike.signal} of {strike.victim}, and /metrics names "
                    f"{blow.named or 'nobody'}: {blow.reason}")
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
        trial = Trial(client, server.url, server=server, num_stages=asked.stages)
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
