"""The page learns here who is where in the pipeline at this moment, and how the last seconds went.

`Live` listens to the engine and remembers little: the flights under way, the last tokens, the last stays at stations.
What is counted by request it reads from the engine. A picture is drawn only while somebody watches, a few times a
second. The events tell where a flight is only when it lands, so until then its place is estimated from how long stages
took lately: it is a picture, not a measurement.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request, params
from fastapi.responses import HTMLResponse, Response

from fullpipe.engine import RequestStats, Stats
from fullpipe.events import Admitted, Attached, Emitted, Fate, Finished, Launched
from fullpipe.messages import Drafted, Event, Landed, Leg, Ready
from fullpipe.options import ServerOptions
from fullpipe.server.guard import EventStream, needs_key
from fullpipe.server.hosts import Hosts
from fullpipe.server.problems import Problem, retry_after
from fullpipe.supervision import Observer, Status
from fullpipe.trace.flying import Flying

WINDOW = 5.0  # seconds that rates are taken over
TICK = 0.2  # seconds between two looks
BEAT = 2.0  # seconds of silence after which a sign of life is sent
_TOKENS = 80  # in the strip
_PAGE = Path(__file__).with_name("page.html")
_POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
           "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
_KEY = Depends(needs_key)


async def _stays() -> bool:
    return False


@dataclass(slots=True)
class _Stay:
    """Holds a station's time with a flight or a job; `alive` is the share of its rows that was not for nothing."""

    station: str
    start: float
    end: float
    alive: float

    def within(self, since: float, until: float) -> float:
        return max(min(self.end, until) - max(self.start, since), 0.0)


class Live(Observer):
    """Watches a service. May be called from any thread.

    num_stages: how many the pipeline has now. status: of the service. text_of: what a token reads as. hosts: where the
    stages are, if on several. show_text: False hides the tokens' text from the feed (it is that of all users). clock:
    the pipeline's.
    """

    def __init__(self, num_stages: Callable[[], int], status: Callable[[], Status], text_of: Callable[[int], str], *,
                 hosts: Hosts | None = None, model_name: str = "", show_text: bool = True, max_watchers: int = 32,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._num_stages, self._status, self._text_of = num_stages, status, text_of
        self._hosts, self._model_name, self._show_text = hosts, model_name, show_text
        self._max_watchers, self._clock = max_watchers, clock
        self._lock = threading.Lock()
        self._version, self._watchers, self._closed = 0, 0, False
        self._stats = Stats()
        self._requests: dict[int, RequestStats] = {}  # those that have run and not ended
        self._flying = Flying()
        self._out = -1  # the newest flight that has left stage 0, or will before another enters
        self._tokens: deque[Emitted] = deque(maxlen=_TOKENS)
        self._fates: deque[tuple[float, Fate]] = deque(maxlen=10_000)
        self._stays: deque[_Stay] = deque(maxlen=4_000)
        self._took: dict[str, float] = {}  # seconds of a stay, a moving mean
        self._began: float | None = None
        self._landed = 0.0

    # ---- what is told ------------------------------------------------------------------------------------

    def on_start(self, stats: Stats) -> None:
        self._stats = stats

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._version += 1
            self._hear(event)
            self._flying(event)

    def _hear(self, event: Event) -> None:
        match event:
            case Attached():  # what was seen of the old stages tells nothing of the new ones
                self._stays.clear()
                self._took, self._began = {}, None
            case Ready():
                self._out = max(self._flying.flights, default=self._out)
            case Admitted():
                self._requests[event.request] = self._stats.of(event.request)
            case Launched():
                self._began = event.time if self._began is None else self._began
            case Landed():
                self._landed = event.time
                for leg in event.legs:
                    self._note_stay(leg)
            case Drafted():
                self._stays.append(_Stay(event.leg.station, event.leg.start, event.leg.end, 1.0))
            case Emitted():
                self._fates.append((event.time, event.fate))
                self._tokens.append(event)
            case Finished():
                self._requests.pop(event.request, None)

    def _note_stay(self, leg: Leg) -> None:
        if leg.nodes:
            took = leg.end - leg.start
            self._took[leg.station] = 0.8 * self._took.get(leg.station, took) + 0.2 * took
            self._stays.append(_Stay(leg.station, leg.start, leg.end, self._flying.alive(leg)))

    def close(self) -> None:
        """End every feed, within one tick. A server calls it when it begins to shut down."""
        self._closed = True

    # ---- the picture -------------------------------------------------------------------------------------

    def picture(self) -> dict[str, Any]:
        """What the page shows, as JSON has it. Shares lie between 0 and 1; null is what is not known yet.

        Of a stage: `rows`, guesses that are there, and `prompts`, rows of prompts, both as [request, count]; of a
        request the same over all stages, `flying` and `prompt`. Of a token: its request, its text, its fate. Of several
        hosts: see `Hosts.picture`; null on one machine.
        """
        status, hosts = self._status(), self._hosts.picture() if self._hosts else None
        with self._lock:
            now = self._clock()
            drafts = any(stay.station == "draft" for stay in self._stays)
            return {"model": self._model_name, **_of_status(status), "stages": self._stages(now),
                    "draft": {"busy": self._busy("draft", now)} if drafts else None,
                    "requests": self._told_requests(), "tokens": self._told_tokens(), "hosts": hosts,
                    **self._rates(now)}

    def _stages(self, now: float) -> list[dict[str, Any]]:
        names = [f"stage {k}" for k in range(self._num_stages())]
        there: list[list[Launched]] = [[] for _ in names]
        for place, flight in self._places(names, now):
            there[place].append(flight)
        return [{"name": name, "busy": self._busy(name, now), **self._told_flights(flights)}
                for name, flights in zip(names, there)]

    def _places(self, names: list[str], now: float) -> Iterator[tuple[int, Launched]]:
        """The stage that each flight has probably come to, oldest flight first: none overtakes another."""
        limit = len(names) - 1
        for flight in self._flying.flights.values():
            place, left = 0, now - flight.time
            while place < limit and left >= self._took.get(names[place], math.inf):
                left -= self._took[names[place]]
                place += 1
            limit = min(limit, 0 if flight.flight > self._out else max(place, 1))
            yield limit, flight

    def _told_flights(self, flights: list[Launched]) -> dict[str, Any]:
        rows: Counter[int] = Counter()
        prompts: Counter[int] = Counter()
        for flight in flights:
            rows.update(self._flying.owner.get(node, -1) for node in flight.nodes)
            prompts.update(flight.prompt_rows)
        dead = rows.pop(-1, 0)
        return {"flights": len(flights), "dead": dead, "rows": _listed(rows), "prompts": _listed(prompts)}

    def _told_requests(self) -> list[dict[str, int]]:
        flying = Counter(self._flying.owner.values())
        prompts: Counter[int] = Counter()
        for flight in self._flying.flights.values():
            prompts.update(flight.prompt_rows)
        return [{"id": id, "emitted": one.num_emitted, "hits": one.hits, "misses": one.misses, "flying": flying[id],
                 "prompt": prompts[id]} for id, one in self._requests.items()]

    def _told_tokens(self) -> list[list[Any]]:
        return [[one.request, self._text_of(one.token) if self._show_text else "", one.fate] for one in self._tokens]

    def _span(self, now: float) -> tuple[float, float]:
        """The window: its end is the last landing while flights are under way, for what they do is not known yet."""
        until = self._landed if self._flying.flights else now
        began = until if self._began is None else self._began
        return max(until - WINDOW, began), until

    def _busy(self, station: str, now: float) -> float | None:
        since, until = self._span(now)
        spent = sum(stay.within(since, until) for stay in self._stays if stay.station == station)
        return _share(spent, until - since)

    def _rates(self, now: float) -> dict[str, float | None]:
        since, until = self._span(now)
        fates = Counter(fate for when, fate in self._fates if when > now - WINDOW)
        counted = fates["hit"] + fates["miss"]
        alive = sum(stay.within(since, until) * stay.alive for stay in self._stays if stay.station != "draft")
        return {"tokens_per_s": round(fates.total() / WINDOW, 1),
                "hit_rate": _share(fates["hit"], counted),
                "acceptance": round(1 + fates["hit"] / max(fates["miss"], 1), 2) if counted else None,
                "fill": _share(alive, self._num_stages() * (until - since))}

    # ---- HTTP --------------------------------------------------------------------------------------------

    def router(self, guards: Sequence[params.Depends] = (_KEY,),
               write_timeout_s: float = ServerOptions().write_timeout) -> APIRouter:
        """`/`, the page, and `/live`, its feed (Server-Sent Events). guards: what `/live` asks for, if not for an API
        key of the application; the page itself tells nothing. write_timeout_s: how long a watcher may take nothing of
        the feed before it counts as gone."""
        router, page = APIRouter(), _PAGE.read_text(encoding="utf-8")

        @router.get("/", include_in_schema=False)
        def show() -> HTMLResponse:
            return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer",
                                               "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"})

        @router.get("/live", include_in_schema=False, dependencies=list(guards))
        async def watch(request: Request) -> Response:
            if self._closed or self._watchers >= self._max_watchers:
                return Problem(503, "too many watch already, or the server is going down", code="service_unavailable",
                               headers=retry_after(5)).response()
            return EventStream(self.feed(request.is_disconnected), write_timeout_s)

        return router

    async def feed(self, gone: Callable[[], Awaitable[bool]] = _stays) -> AsyncGenerator[bytes, None]:
        """A picture whenever there is a new one, several times a second at most, and signs of life in between.

        Ends by itself when the service goes down, for a server waits for open connections before it exits, and when
        the watcher has `gone`.
        """
        self._watchers += 1
        try:
            sent, drawn, version, said = "", -1.0, -1, time.monotonic()
            while not self._closed and not await gone():
                now = time.monotonic()
                if version != self._version or now - drawn >= 1.0:  # rates fade without events
                    drawn, version = now, self._version
                    picture = self.picture()
                    text = json.dumps(picture, separators=(",", ":"))
                    if text != sent:
                        sent, said = text, now
                        yield f"data: {text}\n\n".encode()
                    if picture["state"] in ("draining", "stopped"):
                        return
                if now - said >= BEAT:
                    said = now
                    yield b": still here\n\n"
                await asyncio.sleep(TICK)
        finally:
            self._watchers -= 1


def _share(part: float, whole: float) -> float | None:
    return round(min(part / whole, 1.0), 3) if whole > 0 else None


def _listed(counts: Counter[int]) -> list[list[int]]:
    return [[request, count] for request, count in sorted(counts.items())]


def _of_status(status: Status) -> dict[str, Any]:
    return {"state": status.state, "running": status.running, "waiting": status.waiting, "kv_used": status.kv_used,
            "kv_total": status.kv_total, "restarts": status.restarts, "last_failure": status.last_failure}
