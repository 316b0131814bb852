"""A server on three hosts is struck again and again under load; every text must come out as if nothing had happened.

    python -m fullpipe_lab.studies.serving.host_kills [--strikes 60] [--kinds kill,host,cut,loss,stop] [--clients 4]
        [--seed 1] [--model smollm2-135m] [--draft ngram] [--out FILE] [--report FILE] [--log FILE]

Makes a lab of hosts with a Ray node each and starts `fullpipe serve --hosts ray` on the first. What it answers before
the first strike is what it must say ever after. Then so many clients ask, one request each at any time, and one strike
follows another, in an order that is drawn from the seed:

    kill   a station's process gets SIGKILL
    host   everything on a host gets SIGKILL, its Ray node too, which is started again afterwards
    cut    a link between two hosts carries nothing for 5 s
    loss   a link loses 30% of its packets for 5 s
    stop   a station's process gets SIGSTOP

Some come while the pipeline is being built anew. After each the server has to take in all hosts again: at a quiet
moment, for which the clients rest after every second strike that needs one, or within its time under load.

In the end the server is ended by SIGTERM, and another one by SIGKILL: nothing of them may be left on any host after
10 s. Exits with 1 on any fault. --out gets the receipt, --report a page made of it. Needs root and Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import KW_ONLY, asdict, dataclass, field
from itertools import combinations, count, pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

import httpx

from fullpipe.cli.console import print_table
from fullpipe.cluster.netlab import Netlab, Shape, available
from fullpipe.errors import FullpipeError
from fullpipe.files import write_whole
from fullpipe_lab.hosts import ray_nodes
from fullpipe_lab.hosts.ray_nodes import RayNodes
from fullpipe_lab.hosts.served import Served, move_thread_to
from fullpipe_lab.receipts import save_receipt, study_receipt
from fullpipe_lab.report import render
from fullpipe_lab.studies.serving.processes import Readiness, readiness, restarts_by_station
from fullpipe_lab.studies.serving.under_load import Load, asks, keep_asking, say, undisturbed

Kind = Literal["kill", "host", "cut", "loss", "stop"]

KINDS: tuple[Kind, ...] = ("kill", "host", "cut", "loss", "stop")
EARLY: tuple[Kind, ...] = ("kill", "host", "cut")
"""May come while a pipeline is being built. What is stopped while it is started is noticed only when the time to start
is over; so nothing is."""

ENDS = signal.SIGTERM, signal.SIGKILL
LASTS_S, LOSS = 5.0, 0.3
_DELAYS_MS = (2.0, 3.5, 5.0)
_MAX_LEN, _MAX_SEQS = 1024, 4
_PAUSE_S, _EARLY_S = (1.0, 4.0), (0.0, 3.0)  # before a strike
_START_S, _NOTICE_S, _WHOLE_S = 240.0, 30.0, 240.0  # at most
_LOOK_S = 0.05  # between looks at /ready
_SETTLE_S = 1.0  # from a strike that lasts until nothing of it may come any more, beyond its end


# ---- what is planned -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Strike:
    """where: a host, or the two ends of a link. at: which of a host's stations, as a share of their number.
    early: before the server has got over the strike before. pause_s: before it. quiet: the clients rest after it."""

    number: int
    kind: Kind
    where: tuple[str, ...]
    at: float
    early: bool
    pause_s: float
    quiet: bool


def plan(number: int, hosts: Sequence[str], *, kinds: Sequence[Kind] = KINDS, early: float = 0.15,
         seed: int) -> list[Strike]:
    """Every kind comes once in each round of all, in another order, and so does each place for it. early: the share of
    strikes that do not wait; never two in a row, since who fails five times without a token in between gives up."""
    draw = random.Random(seed)
    places: dict[Kind, list[tuple[str, ...]]] = {kind: [] for kind in kinds}
    round_of_kinds: list[Kind] = []
    quiet = dict.fromkeys(kinds, False)
    strikes: list[Strike] = []
    for place in range(number):
        round_of_kinds = round_of_kinds or draw.sample(kinds, len(kinds))
        kind = round_of_kinds.pop()
        places[kind] = places[kind] or draw.sample(all_places := _places(kind, hosts), len(all_places))
        where, lucky = places[kind].pop(), draw.random() < early
        hurries = lucky and kind in EARLY and bool(strikes) and not strikes[-1].early
        quiet[kind] = not quiet[kind]
        strikes.append(Strike(place, kind, where, draw.random(), hurries,
                              draw.uniform(*(_EARLY_S if hurries else _PAUSE_S)), quiet[kind]))
    return strikes


def _places(kind: Kind, hosts: Sequence[str]) -> list[tuple[str, ...]]:
    if kind in ("cut", "loss"):
        return list(combinations(hosts, 2))
    return [(host,) for host in (hosts[1:] if kind == "host" else hosts)]


# ---- what happens ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Blow:
    """A strike as it went. Seconds are since it began, or None.

    state: of the server, as it said just before. in_flight, begun: requests that were under way at the clients, and
    those of them whose text had begun to come. noticed_s: until /ready counted a failure; reason: of it. ready_s: until
    requests were taken again. whole_s: until every host that can be had has a station again. stall_s: the longest time
    without text for any client that began before the next strike. token_s: until the first text after it was noticed
    and the server was ready again. stations: named by /metrics as failed since.
    """

    number: int
    kind: Kind
    where: str
    early: bool
    state: str
    at_s: float
    in_flight: int
    begun: int
    noticed_s: float | None = None
    reason: str = ""
    ready_s: float | None = None
    whole_s: float | None = None
    token_s: float | None = None
    stall_s: float | None = None
    stations: str = ""


@dataclass
class Trial(Load):
    """A run's state."""

    _: KW_ONLY
    served: Served
    blows: list[Blow] = field(default_factory=list)
    returning: list[asyncio.Task[None]] = field(default_factory=list)

    async def look(self) -> Readiness:
        self.served.check()
        return await readiness(self.client, self.url)

    async def until(self, holds: Callable[[], Awaitable[bool]], limit_s: float) -> bool:
        """Whether it holds within so many seconds."""
        until = time.monotonic() + limit_s
        while not await holds():
            if time.monotonic() > until:
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    async def serves(self) -> bool:
        return (await self.look()).status == 200

    async def is_whole(self) -> bool:
        """Whether it serves, and every host has a station."""
        if not await self.serves():
            return False
        found = await asyncio.gather(*(asyncio.to_thread(self.served.stations, host) for host in self.served.lab.names))
        return all(found)


async def strike_all(trial: Trial, strikes: Sequence[Strike]) -> None:
    """Raises FullpipeError when the server does not notice, or does not come back."""
    for strike, after in pairwise([*strikes, None]):
        assert strike
        await asyncio.sleep(strike.pause_s)
        blow = await _begun(trial, strike)
        before, counted = await trial.look(), await restarts_by_station(trial.client, trial.url)
        watching = asyncio.create_task(_watch(trial, blow, before))
        try:
            await _hit(trial, strike)
            await watching
        except BaseException:
            watching.cancel()
            raise
        if after is None or not after.early:
            await _get_over(trial, strike, blow)
        grown = Counter(await restarts_by_station(trial.client, trial.url)) - Counter(counted)
        blow.stations = ", ".join(sorted(grown.elements()))
        _judge(trial, strike, blow)
        say(_line(blow))


async def _begun(trial: Trial, strike: Strike) -> Blow:
    before = await trial.look()
    now = time.monotonic()
    trial.struck_at.append(now)
    blow = Blow(strike.number, strike.kind, "-".join(strike.where), strike.early, before.state, now - trial.started,
                len(trial.pending), sum(one.begun for one in trial.pending.values()))
    trial.blows.append(blow)
    return blow


async def _hit(trial: Trial, strike: Strike) -> None:
    """Do it, for as long as it lasts."""
    served = trial.served
    match strike.kind:
        case "kill" | "stop":
            await _signal(served, strike)
        case "host":
            await asyncio.to_thread(served.lose, *strike.where)
            trial.returning.append(asyncio.create_task(_bring_back(served, *strike.where)))
        case "cut":
            with served.cut(*strike.where):
                await asyncio.sleep(LASTS_S)
        case "loss":
            a, b = strike.where
            with served.losing(a, b, LOSS):
                await asyncio.sleep(LASTS_S)


async def _signal(served: Served, strike: Strike) -> None:
    """To one of the host's stations. Early, a host that was just lost may have none: then to one of another host's; and
    while a pipeline is built there may be none at all."""
    hosts = [*strike.where, *(served.lab.names if strike.early else ())]
    until = time.monotonic() + _NOTICE_S
    while not (there := await asyncio.to_thread(_first_stations, served, hosts)):
        if time.monotonic() > until:
            raise FullpipeError(f"there is no station on {strike.where[0]}")
    os.kill(there[int(strike.at * len(there))], signal.SIGKILL if strike.kind == "kill" else signal.SIGSTOP)


def _first_stations(served: Served, hosts: Sequence[str]) -> list[int]:
    """Of the first of these hosts that has any."""
    return next((found for host in hosts if (found := served.stations(host))), [])


async def _bring_back(served: Served, host: str) -> None:
    await asyncio.sleep(LASTS_S)
    await asyncio.to_thread(served.bring_back, host)


async def _watch(trial: Trial, blow: Blow, before: Readiness) -> None:
    """Until it is noticed, or need not be any more."""
    struck = trial.started + blow.at_s
    limit = _NOTICE_S if _must_be_noticed(blow) else LASTS_S + _SETTLE_S
    while (now := await trial.look()).restarts == before.restarts:
        if time.monotonic() - struck > limit:
            return
        await asyncio.sleep(_LOOK_S)
    blow.noticed_s, blow.reason = time.monotonic() - struck, now.last_failure.partition("\n")[0]


async def _get_over(trial: Trial, strike: Strike, blow: Blow) -> None:
    """Until it serves, and then until all hosts have stations."""
    struck = trial.started + blow.at_s
    if not await trial.until(trial.serves, _WHOLE_S):
        raise FullpipeError(f"the server is not ready {_WHOLE_S:g} s after strike {strike.number}")
    blow.ready_s = time.monotonic() - struck
    await asyncio.gather(*trial.returning)
    trial.returning.clear()
    if strike.quiet:
        trial.gate.clear()
    try:
        if not await trial.until(trial.is_whole, _WHOLE_S):
            raise FullpipeError(f"not all hosts take part {_WHOLE_S:g} s after strike {strike.number}")
        blow.whole_s = time.monotonic() - struck
    finally:
        trial.gate.set()


def _judge(trial: Trial, strike: Strike, blow: Blow) -> None:
    """Whether it was noticed, and for what it is."""
    if blow.noticed_s is None:
        if _must_be_noticed(blow):
            trial.fault(f"strike {strike.number} ({strike.kind} {blow.where}) is not noticed")
    elif strike.kind in ("kill", "stop", "host") and not strike.early and not _names(blow.reason, trial, strike):
        trial.fault(f"strike {strike.number} ({strike.kind} {blow.where}) is taken for another: {blow.reason}")


def _must_be_noticed(blow: Blow) -> bool:
    """A link may do without some packets; and what is struck early may not be in use yet, or not any more."""
    return blow.kind != "loss" and not blow.early


def _names(reason: str, trial: Trial, strike: Strike) -> bool:
    """Whether a failure is told of the host that was struck (the lab's hosts share a name, so Ray has addresses), or by
    a neighbour who lost it: of a whole host nobody else may be left to tell."""
    return (f" on {trial.served.lab.address(strike.where[0])} " in reason
            or (strike.kind == "host" and "lost its connection" in reason))


def note_texts(blows: Sequence[Blow], texts_at: Sequence[float], end: float) -> None:
    """token_s and stall_s of each blow, from when text came to any client (seconds on the blows' clock, rising)."""
    for blow, following in zip(blows, [*(one.at_s for one in blows[1:]), end]):
        first = bisect_right(texts_at, blow.at_s)
        times = [blow.at_s, *(at for at in texts_at[first:] if at < following)]
        blow.stall_s = max((after - before for before, after in pairwise(times)), default=None)
        if blow.noticed_s is not None and blow.ready_s is not None:
            since = blow.at_s + blow.noticed_s
            blow.token_s = next((at - blow.at_s for at in times if at > since), None)


# ---- the run ---------------------------------------------------------------------------------------------


async def run(asked: argparse.Namespace, served: Served) -> Trial:
    """All of it. What goes wrong is in the trial's faults."""
    what = asks(asked.requests)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
        trial = Trial(client, served.url, served=served)
        await _await_ready(trial)
        say(f"asking {len(what)} requests of a server to which nothing is done")
        try:
            await undisturbed(trial, what, asked.clients)
        except* FullpipeError as group:
            raise FullpipeError(str(group.exceptions[0])) from None
        say(f"{sum(reply.tokens or 0 for reply in trial.expected.values())} tokens in {trial.now():.0f} s; now "
            f"{asked.strikes} strikes under {asked.clients} clients")
        trial.started = time.monotonic()
        await _under_load(trial, asked)
        for number, following in pairwise([*asked.ends, None]):
            await _ends(trial, number)
            if following:
                served.start()
                await _await_ready(trial)
        return trial


async def _await_ready(trial: Trial) -> None:
    """Raises FullpipeError where it never is."""
    async def is_ready() -> bool:
        try:
            return await trial.is_whole()
        except httpx.HTTPError:
            return False

    if not await trial.until(is_ready, _START_S):
        raise FullpipeError(f"the server is not ready after {_START_S:g} s: {trial.served.tail()}")


async def _under_load(trial: Trial, asked: argparse.Namespace) -> None:
    what = asks(asked.requests)
    strikes = plan(asked.strikes, trial.served.lab.names, kinds=asked.kinds, early=asked.early, seed=asked.seed)
    enough = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for own in range(asked.clients):
            order = random.Random(1000 * asked.seed + own)
            group.create_task(keep_asking(trial, own, (order.choice(what) for _ in count()), enough))
        try:
            await strike_all(trial, strikes)
        except (FullpipeError, httpx.HTTPError, OSError) as error:
            trial.fault(f"the run ended early: {type(error).__name__}: {error}")
        enough.set()
    note_texts(trial.blows, [at - trial.started for at in trial.texts_at], trial.now())
    await trial.until(trial.serves, _WHOLE_S)  # a host that comes may just be taken in
    last = await trial.look()
    if (last.state, last.running, last.waiting) != ("ready", 0, 0):
        trial.fault(f"at the end the server is {last.state} with {last.running} running and {last.waiting} waiting")


async def _ends(trial: Trial, number: signal.Signals) -> None:
    """Nothing of it may be left."""
    await asyncio.to_thread(trial.served.end, number)
    if left := await asyncio.to_thread(trial.served.left):
        trial.fault(f"after {number.name} there is left on {left}")


# ---- what is told ----------------------------------------------------------------------------------------


def results_of(trial: Trial) -> dict[str, Any]:
    struck = [sample for sample in trial.samples if sample.strikes]
    return {
        "strikes": len(trial.blows), "early": sum(blow.early for blow in trial.blows),
        "requests": len(trial.samples), "tokens": sum(sample.tokens or 0 for sample in trial.samples),
        "struck_requests": len(struck), "most_strikes_of_a_request": max((one.strikes for one in struck), default=0),
        "retried_503": sum(sample.retries for sample in trial.samples),
        "different_or_failed": sum(bool(sample.fault) for sample in trial.samples),
        "in_flight": sum(blow.in_flight for blow in trial.blows),
        "begun_in_flight": sum(blow.begun for blow in trial.blows),
        "kinds": [_of_kind(kind, [blow for blow in trial.blows if blow.kind == kind]) for kind in KINDS],
        "faults": trial.faults,
    }


_SECONDS = ("noticed_s", "ready_s", "token_s", "stall_s", "whole_s")


def _of_kind(kind: Kind, blows: Sequence[Blow]) -> dict[str, Any]:
    """How many there were, how many were noticed, and median and worst of the seconds."""
    found: dict[str, Any] = {"kind": kind, "strikes": len(blows), "noticed": sum(one.noticed_s is not None
                                                                                for one in blows)}
    for name in _SECONDS:
        values = [value for one in blows if (value := getattr(one, name)) is not None]
        found |= {f"{name}_median": round(median(values), 2) if values else None,
                  f"{name}_worst": round(max(values), 2) if values else None}
    return found


def table_of(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: seconds as median / worst, by kind."""
    def cell(one: Mapping[str, Any], name: str) -> str:
        return "" if one[f"{name}_median"] is None else f"{one[f'{name}_median']:.1f} / {one[f'{name}_worst']:.1f}"

    heads = ["strike", "times", "noticed", "noticed after s", "ready", "next token", "longest stall", "all hosts again"]
    return heads, [[one["kind"], str(one["strikes"]), str(one["noticed"]), *(cell(one, name) for name in _SECONDS)]
                   for one in results["kinds"]]


def _line(blow: Blow) -> str:
    def told(name: str, seconds: float | None) -> str:
        return f"{name} after {seconds:5.2f} s" if seconds is not None else f"not {name}"

    early = ", early" if blow.early else ""
    return (f"{blow.number + 1:4d}  {blow.kind:4s} {blow.where:6s} ({blow.state}{early}), {blow.in_flight} in flight, "
            f"{blow.begun} begun; {told('noticed', blow.noticed_s)}, {told('ready', blow.ready_s)}, "
            f"{told('whole', blow.whole_s)}; {blow.reason[:100]}")


def on_head(served: Served, asked: argparse.Namespace) -> Trial:
    """Run it in a thread whose sockets are on the head. Raises what it raises."""
    done: Future[Trial] = Future()

    def work() -> None:
        try:
            move_thread_to(served.lab, served.nodes.head)
            done.set_result(asyncio.run(run(asked, served)))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, name="host-kills", daemon=True).start()
    return done.result()


def main(arguments: list[str] | None = None) -> None:
    asked = _parser().parse_args(arguments)
    if why := available() or ray_nodes.missing():
        sys.exit(f"error: {why}")
    log = asked.log or Path(tempfile.mkdtemp(prefix="fullpipe-kills-")) / "server.log"
    log.unlink(missing_ok=True)
    say(f"starting {asked.model}, draft {asked.draft}, on {asked.hosts} hosts; the server's log is {log}")
    options = ("--model", asked.model, "--draft", asked.draft, "--stages", str(asked.hosts), "--max-model-len",
               str(_MAX_LEN), "--max-num-seqs", str(_MAX_SEQS), *asked.serve)
    pairs = combinations([f"h{number}" for number in range(1, asked.hosts + 1)], 2)
    links = {pair: Shape(delay_ms=_DELAYS_MS[at % len(_DELAYS_MS)]) for at, pair in enumerate(pairs)}
    try:
        with Netlab(asked.hosts, links=links) as lab, RayNodes(lab, cpus=1) as nodes:
            served = Served(lab, nodes, options, log)
            try:
                served.start()
                trial = on_head(served, asked)
            finally:
                served.end(signal.SIGKILL)
    except FullpipeError as error:
        sys.exit(f"error: {error}")
    _tell(trial, served, asked)
    sys.exit(1 if trial.faults else 0)


def _tell(trial: Trial, served: Served, asked: argparse.Namespace) -> None:
    results = results_of(trial)
    print_table(["", ""], [[name, str(value)] for name, value in results.items() if name not in ("faults", "kinds")])
    heads, rows = table_of(results)
    print_table(heads, rows)
    samples = [{"strike": asdict(blow)} for blow in trial.blows] + [asdict(one) for one in trial.samples]
    receipt = study_receipt("serving_host_kills", results | {"server": served.command}, samples)
    if asked.out:
        save_receipt(receipt, asked.out)
        say(f"wrote {asked.out}")
    if asked.report:
        write_whole(asked.report, render("host_kills.md.j2", receipt=receipt, heads=heads, rows=rows))
        say(f"wrote {asked.report}")
    for fault in trial.faults:
        print(f"FAULT {fault[:1000]}")


def _kinds(value: str) -> tuple[Kind, ...]:
    chosen = tuple(kind for kind in KINDS if kind in value.split(","))
    if len(chosen) != len(value.split(",")):
        raise argparse.ArgumentTypeError(f"kinds are {', '.join(KINDS)} (got {value})")
    return chosen


def _signals(value: str) -> tuple[signal.Signals, ...]:
    try:
        return tuple(signal.Signals[name] for name in value.split(","))
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"there is no signal {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strikes", type=int, default=60)
    parser.add_argument("--kinds", type=_kinds, default=KINDS, help="of strikes, joined by commas")
    parser.add_argument("--model", default="smollm2-135m", help="as `fullpipe serve` takes it")
    parser.add_argument("--draft", default="ngram", help="as `fullpipe serve` takes it")
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4, help="each has one request under way at any time")
    parser.add_argument("--requests", type=int, default=20, help="different ones")
    parser.add_argument("--early", type=float, default=0.15, help="share of strikes that do not wait")
    parser.add_argument("--ends", type=_signals, default=ENDS, metavar="SIGNALS", help="of a server each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", nargs="*", default=(), metavar="WORD", help="more for `fullpipe serve`")
    parser.add_argument("--out", type=Path, help="JSON receipt")
    parser.add_argument("--report", type=Path, help="Markdown page")
    parser.add_argument("--log", type=Path, help="where the server's log goes")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must be ended on the way out
    main()
