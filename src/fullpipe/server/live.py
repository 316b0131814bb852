"""The pipeline at this moment, for the page: who is where, and how the last seconds went.

`Live` listens to the engine and remembers little: the flights under way, the last tokens, the last stays at stations.
A picture is drawn of it only while somebody watches, a few times a second. Where a flight is the events tell only when
it lands, so until then its place is estimated from how long stages took lately: it is a picture, not a measurement.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request, params
from fastapi.responses import HTMLResponse, Response

from fullpipe.messages import Died, Drafted, Emitted, Event, Finished, Landed, Launched, Leg, Ready
from fullpipe.sequences.stats import RequestStats
from fullpipe.server.guard import WRITE_TIMEOUT_S, EventStream, needs_key
from fullpipe.server.problems import Problem, retry_after
from fullpipe.service import Observer, Status

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
class _Flying:
    launched: float
    nodes: list[int]
    prompts: dict[int, int]  # rows of prompts by request
    inside: bool = True  # at stage 0, which has not asked for another


@dataclass(slots=True)
class _Seen:
    """A request in the pipeline. hit: of its last token, until the next one says that it counts."""

    emitted: int = 0
    hits: int = 0
    misses: int = 0
    hit: bool | None = None


@dataclass(slots=True)
class _Stay:
    """A stage's or the draft's time with a flight or job; `alive` is the share of its rows that was not for nothing."""

    station: str
    start: float
    end: float
    alive: float


@dataclass(slots=True)
class _Moment:
    flights: dict[int, _Flying] = field(default_factory=dict)
    owner: dict[int, int] = field(default_factory=dict)  # request of each node under way that has not died
    died: dict[int, float] = field(default_factory=dict)  # nodes under way that have died, and when
    took: dict[str, float] = field(default_factory=dict)  # seconds, a moving mean
    requests: dict[int, _Seen] = field(default_factory=dict)
    tokens: deque[tuple[int, int, bool]] = field(default_factory=lambda: deque(maxlen=_TOKENS))
    times: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    outcomes: deque[tuple[float, bool]] = field(default_factory=lambda: deque(maxlen=10_000))
    stays: deque[_Stay] = field(default_factory=lambda: deque(maxlen=4_000))
    landed: float = 0.0
    began: float | None = None


class Live(Observer):
    """Watches a service. May be called from any thread.

    num_stages: how many to show. status: of the service. text_of: what a token reads as. show_text: False hides the
    tokens' text from the feed (it is that of all users). clock: the pipeline's.
    """

    def __init__(self, num_stages: int, status: Callable[[], Status], text_of: Callable[[int], str], *,
                 model_name: str = "", show_text: bool = True, max_watchers: int = 32,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._num_stages, self._status, self._text_of = num_stages, status, text_of
        self._model_name, self._show_text = model_name, show_text
        self._max_watchers, self._clock = max_watchers, clock
        self._lock = threading.Lock()
        self._at = _Moment()
        self._version = 0
        self._watchers = 0
        self._closed = False
        self._handlers: dict[type[Event], Callable[..., None]] = {
            Ready: self._ready, Launched: self._launched, Landed: self._landed, Drafted: self._drafted,
            Emitted: self._emitted, Died: self._died, Finished: self._finished}

    def __call__(self, event: Event) -> None:
        if handler := self._handlers.get(type(event)):
            with self._lock:
                self._version += 1
                handler(event)

    def on_finish(self, id: int, reason: str, prompt_tokens: int, completion_tokens: int, stats: RequestStats,
                  cached_tokens: int) -> None:
        """Of one that the service ended itself no engine says `Finished`."""
        with self._lock:
            self._version += 1
            self._at.requests.pop(id, None)

    def on_restart(self, station: str, reason: str) -> None:
        with self._lock:
            self._version += 1
            self._at.flights.clear()
            self._at.owner.clear()
            self._at.died.clear()

    def close(self) -> None:
        """End every feed, within one tick. A server calls it when it begins to shut down."""
        self._closed = True

    # ---- the engine's events -----------------------------------------------------------------------------

    def _ready(self, event: Ready) -> None:
        for flight in self._at.flights.values():
            flight.inside = False

    def _launched(self, event: Launched) -> None:
        at = self._at
        at.began = event.time if at.began is None else at.began
        at.flights[event.flight] = _Flying(event.time, event.nodes, event.prompt_rows)
        at.owner.update(zip(event.nodes, event.requests))
        for request in (*event.requests, *event.prompt_rows):
            if request not in at.requests:
                at.requests[request] = _Seen()

    def _landed(self, event: Landed) -> None:
        at = self._at
        at.landed = event.time
        for leg in event.legs:
            if leg.nodes:
                took = leg.end - leg.start
                at.took[leg.station] = 0.8 * at.took.get(leg.station, took) + 0.2 * took
                alive = sum(at.died.get(node, leg.end) >= leg.end for node in leg.nodes)
                at.stays.append(_stay(leg, alive / len(leg.nodes)))
        if flight := at.flights.pop(event.flight, None):
            for node in flight.nodes:
                at.owner.pop(node, None)
                at.died.pop(node, None)

    def _drafted(self, event: Drafted) -> None:
        self._at.stays.append(_stay(event.leg, 1.0))

    def _emitted(self, event: Emitted) -> None:
        at = self._at
        seen = at.requests.setdefault(event.request, _Seen())
        self._settle(seen, event.time)
        seen.hit = event.hit
        seen.emitted += 1
        at.times.append(event.time)
        at.tokens.append((event.request, event.token, event.hit))

    def _settle(self, seen: _Seen, now: float) -> None:
        """Another token follows the last one, which counts now."""
        if seen.hit is not None:
            seen.hits += seen.hit
            seen.misses += not seen.hit
            self._at.outcomes.append((now, seen.hit))

    def _died(self, event: Died) -> None:
        for node in event.nodes:
            if self._at.owner.pop(node, None) is not None:
                self._at.died[node] = event.time

    def _finished(self, event: Finished) -> None:
        self._at.requests.pop(event.request, None)

    # ---- the picture -------------------------------------------------------------------------------------

    def picture(self) -> dict[str, Any]:
        """What the page shows, as JSON has it. Shares lie between 0 and 1; null is what is not known yet.

        Of a stage: `rows`, guesses that are there, and `prompts`, rows of prompts, both as [request, count]; of a
        request the same over all stages, `flying` and `prompt`.
        """
        status = self._status()
        with self._lock:
            now = self._clock()
            return {"model": self._model_name, **_of_status(status), "stages": self._stages(now),
                    "draft": self._draft(now), "requests": self._requests(), "tokens": self._tokens(),
                    **self._rates(now)}

    def _stages(self, now: float) -> list[dict[str, Any]]:
        names = [f"stage {k}" for k in range(self._num_stages)]
        rows: list[Counter[int]] = [Counter() for _ in names]
        prompts: list[Counter[int]] = [Counter() for _ in names]
        dead, flights = [0] * len(names), [0] * len(names)
        for place, flight in self._places(names, now):
            owned = Counter(self._at.owner.get(node, -1) for node in flight.nodes)
            dead[place] += owned.pop(-1, 0)
            flights[place] += 1
            rows[place] += owned
            prompts[place].update(flight.prompts)
        return [{"name": name, "busy": self._busy(name, now), "flights": flights[k], "dead": dead[k],
                 "rows": _listed(rows[k]), "prompts": _listed(prompts[k])} for k, name in enumerate(names)]

    def _places(self, names: list[str], now: float) -> list[tuple[int, _Flying]]:
        """The stage that each flight has probably come to, oldest flight first: none overtakes another."""
        limit, found = len(names) - 1, []
        for flight in self._at.flights.values():
            place, left = 0, now - flight.launched
            while place < limit and left >= self._at.took.get(names[place], float("inf")):
                left -= self._at.took[names[place]]
                place += 1
            limit = min(limit, 0 if flight.inside else max(place, 1))
            found.append((limit, flight))
        return found

    def _busy(self, station: str, now: float) -> float | None:
        since, until = self._span(now)
        if until <= since:
            return None
        spent = sum(max(min(stay.end, until) - max(stay.start, since), 0.0) for stay in self._at.stays
                    if stay.station == station)
        return round(min(spent / (until - since), 1.0), 3)

    def _span(self, now: float) -> tuple[float, float]:
        """The window: its end is the last landing while flights are under way, for what they do is not known yet."""
        until = self._at.landed if self._at.flights else now
        began = until if self._at.began is None else self._at.began
        return max(until - WINDOW, began), until

    def _draft(self, now: float) -> dict[str, Any] | None:
        if not any(stay.station == "draft" for stay in self._at.stays):
            return None
        return {"busy": self._busy("draft", now)}

    def _requests(self) -> list[dict[str, int]]:
        flying = Counter(self._at.owner.values())
        prompts: Counter[int] = Counter()
        for flight in self._at.flights.values():
            prompts.update(flight.prompts)
        return [{"id": id, "emitted": seen.emitted, "hits": seen.hits, "misses": seen.misses, "flying": flying[id],
                 "prompt": prompts[id]} for id, seen in self._at.requests.items()]

    def _tokens(self) -> list[list[Any]]:
        return [[request, self._text_of(token) if self._show_text else "", hit]
                for request, token, hit in self._at.tokens]

    def _rates(self, now: float) -> dict[str, float | None]:
        at, (since, until) = self._at, self._span(now)
        hits = [hit for when, hit in at.outcomes if when > now - WINDOW]
        spent = sum((min(stay.end, until) - max(stay.start, since)) * stay.alive for stay in at.stays
                    if stay.station != "draft" and stay.end > since and stay.start < until)
        return {"tokens_per_s": round(sum(when > now - WINDOW for when in at.times) / WINDOW, 1),
                "hit_rate": round(sum(hits) / len(hits), 3) if hits else None,
                "acceptance": round(1 + sum(hits) / max(len(hits) - sum(hits), 1), 2) if hits else None,
                "fill": round(min(spent / (self._num_stages * (until - since)), 1.0), 3) if until > since else None}

    # ---- HTTP --------------------------------------------------------------------------------------------

    def router(self, guards: Sequence[params.Depends] = (_KEY,), write_timeout_s: float = WRITE_TIMEOUT_S) -> APIRouter:
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


def _stay(leg: Leg, alive: float) -> _Stay:
    return _Stay(leg.station, leg.start, leg.end, alive)


def _listed(counts: Counter[int]) -> list[list[int]]:
    return [[request, count] for request, count in sorted(counts.items())]


def _of_status(status: Status) -> dict[str, Any]:
    return {"state": status.state, "running": status.running, "waiting": status.waiting, "kv_used": status.kv_used,
            "kv_total": status.kv_total, "restarts": status.restarts, "last_failure": status.last_failure}
