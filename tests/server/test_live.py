"""The picture of the moment is what the events say, and the feed ends when it should."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from fullpipe.engine import Stats
from fullpipe.events import Admitted, Attached, Died, Emitted, Finished, Launched, Submitted
from fullpipe.messages import Drafted, Event, Landed, Leg, Ready
from fullpipe.options import ServerOptions
from fullpipe.server import live as module
from fullpipe.server.app import ServedModel, create_app
from fullpipe.server.live import Live
from fullpipe.supervision import Status
from fullpipe.trace.flying import Flying
from recorded import recorded


class Stand:
    """A `Live` of three stages with its own clock and status."""

    def __init__(self, **options: Any) -> None:
        self.now = 0.0
        self.status = Status("ready", 1, 2, 10, 40, 0)
        self.live = Live(lambda: 3, lambda: self.status, lambda token: f"<{token}>", model_name="m",
                         clock=lambda: self.now, **options)
        self.stats = Stats()
        self.live.on_start(self.stats)

    def tell(self, *events: Event) -> dict[str, Any]:
        for event in events:
            self.stats(event)
            self.live(event)
            self.now = max(self.now, event.time)
        return self.live.picture()


def came(*requests: int) -> list[Event]:
    return [event for one in requests for event in (Submitted(0, one, 3, 0), Admitted(0, one))]


def launch(time: float, flight: int, nodes: list[int], requests: list[int]) -> Launched:
    return Launched(time, flight, nodes, [-1] * len(nodes), nodes, nodes, requests)


def landing(flight: int, nodes: list[int], *ends: float) -> Landed:
    """A flight that entered stage 0 at ends[0] and left stage k at ends[k + 1]."""
    legs = [Leg(f"stage {k}", start, end, nodes) for k, (start, end) in enumerate(pairwise(ends))]
    return Landed(ends[-1], flight, nodes, nodes, legs=legs)


def rows(picture: dict[str, Any]) -> list[list[list[int]]]:
    return [stage["rows"] for stage in picture["stages"]]


def test_a_flight_moves_on_as_fast_as_the_last_ones_did() -> None:
    stand = Stand()
    assert rows(stand.tell(*came(7, 8), launch(0, 0, [0, 1, 2], [7, 7, 8]))) == [[[7, 2], [8, 1]], [], []]
    assert rows(stand.tell(Ready(1))) == [[], [[7, 2], [8, 1]], []]  # stage 0 asked for another
    assert rows(stand.tell(landing(0, [0, 1, 2], 0, 1, 2, 3))) == [[], [], []]
    stand.tell(launch(3, 1, [3], [7]), Ready(4), launch(4, 2, [4], [8]))
    assert rows(stand.live.picture()) == [[[8, 1]], [[7, 1]], []]
    stand.now = 5.5
    assert rows(stand.live.picture()) == [[[8, 1]], [], [[7, 1]]]  # it is still in, whatever time says
    stand.now = 50.0
    assert rows(stand.tell(Ready(50))) == [[], [], [[7, 1], [8, 1]]]


def test_rows_of_prompts_travel_with_their_flight() -> None:
    stand = Stand()
    flight = launch(0, 0, [0], [7])
    flight.prompt_rows = {8: 64, 9: 3}
    picture = stand.tell(*came(7, 8, 9), flight, Ready(1),
                         Launched(1, 1, [], [], [], [], [], {8: 30}))
    assert [stage["prompts"] for stage in picture["stages"]] == [[[8, 30]], [[8, 64], [9, 3]], []]
    assert rows(picture) == [[], [[7, 1]], []] and [stage["flights"] for stage in picture["stages"]] == [1, 1, 0]
    told = {one["id"]: (one["flying"], one["prompt"]) for one in picture["requests"]}
    assert told == {7: (1, 0), 8: (0, 94), 9: (0, 3)}
    picture = stand.tell(landing(0, [0, -1], 0, 1, 2, 3))
    assert [stage["prompts"] for stage in picture["stages"]] == [[[8, 30]], [], []]  # it has not asked for another
    assert {one["id"]: one["prompt"] for one in picture["requests"]} == {7: 0, 8: 30, 9: 0}


def test_a_recorded_run_shows_every_row_of_its_prompts() -> None:
    stand, shown = Stand(), dict[int, int]()
    for event in recorded(stages=3, requests=2, tokens=12):
        stand.tell(event)
        if isinstance(event, Launched):
            for request, count in event.prompt_rows.items():
                shown[request] = shown.get(request, 0) + count
            told = [sum(count for _, count in stage["prompts"]) for stage in stand.live.picture()["stages"]]
            assert sum(told) >= sum(event.prompt_rows.values())
    assert len(shown) == 2 and min(shown.values()) > 0


def test_dead_rows_are_told_apart_and_requests_know_what_they_have_in_flight() -> None:
    stand = Stand()
    picture = stand.tell(*came(7, 8), launch(0, 0, [0, 1, 2, 3], [7, 7, 8, 8]), Died(1, 7, [1, 99]))
    assert rows(picture)[0] == [[7, 1], [8, 2]] and picture["stages"][0]["dead"] == 1
    assert {one["id"]: one["flying"] for one in picture["requests"]} == {7: 1, 8: 2}
    picture = stand.tell(Finished(1, 8, "abort"), Died(1, 8, [2, 3]))
    assert [one["id"] for one in picture["requests"]] == [7] and picture["stages"][0]["dead"] == 3


def test_tokens_and_rates() -> None:
    stand, fates = Stand(), ("hit", "hit", "miss", "last")
    picture = stand.tell(*came(7), *(Emitted(float(k), 7, k, 40 + k, 0, fate) for k, fate in enumerate(fates)))
    assert picture["tokens"] == [[7, "<40>", "hit"], [7, "<41>", "hit"], [7, "<42>", "miss"], [7, "<43>", "last"]]
    assert (picture["hit_rate"], picture["acceptance"]) == (0.667, 3.0)  # the last one counts as neither
    assert picture["tokens_per_s"] == 4 / module.WINDOW
    stand.now = 7.5
    assert stand.live.picture()["tokens_per_s"] == 1 / module.WINDOW
    stand.now = 100.0
    picture = stand.live.picture()
    assert (picture["tokens_per_s"], picture["hit_rate"], picture["acceptance"]) == (0, None, None)


def test_what_is_counted_by_request_is_the_engines_count() -> None:
    stand = Stand()
    stand.tell(*came(7))
    stats = stand.stats.of(7)
    stats.num_emitted, stats.hits, stats.misses = 9, 5, 3
    [request] = stand.live.picture()["requests"]
    assert (request["id"], request["emitted"], request["hits"], request["misses"]) == (7, 9, 5, 3)


def test_busy_and_fill_share_stage_time_as_the_legs_say() -> None:
    stand = Stand()
    picture = stand.tell(*came(7), launch(0, 0, [0, 1], [7, 7]), Drafted(1, 0, [], Leg("draft", 0.5, 1, [0])),
                         Died(1.5, 7, [1]), landing(0, [0, 1], 0, 1, 2, 4))
    assert [stage["busy"] for stage in picture["stages"]] == [0.25, 0.25, 0.5]
    assert picture["draft"] == {"busy": 0.125}
    assert picture["fill"] == pytest.approx((1 + 0.5 + 1) / 12, abs=1e-3)  # node 1 was alive at stage 0 only


def test_hidden_text_does_not_leave() -> None:
    stand = Stand(show_text=False)
    assert stand.tell(*came(7), Emitted(1, 7, 0, 40, 0, "hit"))["tokens"] == [[7, "", "hit"]]


def test_another_pipeline_begins_empty_and_keeps_the_requests() -> None:
    stand = Stand()
    stand.tell(*came(7), launch(0, 0, [0, 1], [7, 7]), Died(1, 7, [1]), Attached(2))
    assert rows(stand.live.picture()) == [[], [], []]
    picture = stand.tell(launch(3, 1, [2], [7]))
    assert rows(picture) == [[[7, 1]], [], []] and picture["stages"][0]["dead"] == 0
    assert [one["id"] for one in picture["requests"]] == [7]


def test_another_pipelines_stages_are_measured_anew() -> None:
    stand = Stand()
    stand.tell(*came(7), launch(0, 0, [0], [7]), landing(0, [0], 0, 1, 2, 4), Attached(5))
    assert [stage["busy"] for stage in stand.live.picture()["stages"]] == [None, None, None]
    stand.tell(launch(6, 1, [1], [7]), Ready(7))
    stand.now = 9.5
    assert rows(stand.live.picture()) == [[], [[7, 1]], []]  # how long stage 1 takes now nobody has seen


def test_nothing_is_kept_of_what_is_over() -> None:
    stand = Stand()
    picture = stand.tell(*recorded(stages=3, requests=2, tokens=12))
    assert rows(picture) == [[], [], []] and picture["requests"] == []
    assert stand.live._flying == Flying()
    assert len(picture["tokens"]) == 24


def sent(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK", 0.001)
    monkeypatch.setattr(module, "BEAT", 0.01)


@pytest.mark.usefixtures("quick")
def test_the_feed_speaks_when_something_changed_and_gives_signs_of_life() -> None:
    async def watch() -> None:
        stand = Stand()
        feed = stand.live.feed()
        [first] = sent((await anext(feed)).decode())
        assert (first["state"], first["waiting"], first["model"]) == ("ready", 2, "m")
        assert (await anext(feed)).startswith(b":")  # nothing new
        stand.tell(*came(7), launch(0, 0, [0], [7]))
        [second] = sent((await anext(feed)).decode())
        assert second["stages"][0]["rows"] == [[7, 1]]
        stand.live.close()
        with pytest.raises(StopAsyncIteration):
            await anext(feed)

    asyncio.run(watch())


@pytest.mark.parametrize("state", ["draining", "stopped"])
def test_the_feed_ends_with_the_service(state: Any) -> None:
    stand = Stand()
    stand.status = Status(state, 0, 0, 0, 0, 3, "stage 1: died")
    app = FastAPI()
    app.include_router(stand.live.router(guards=()))
    with TestClient(app) as client:
        [last] = sent(client.get("/live").text)
    assert (last["state"], last["restarts"], last["last_failure"]) == (state, 3, "stage 1: died")


@pytest.mark.usefixtures("quick")
def test_a_watcher_that_goes_makes_room_for_another() -> None:
    async def come_and_go() -> None:
        stand = Stand(max_watchers=1)
        feed = stand.live.feed()
        await anext(feed)
        app = FastAPI()
        app.include_router(stand.live.router(guards=()))
        with TestClient(app) as client:
            refused = client.get("/live")
            assert refused.status_code == 503 and refused.headers["Retry-After"]
            assert refused.json()["error"]["message"]
            await feed.aclose()
            stand.status = Status("draining", 0, 0, 0, 0, 0)
            assert client.get("/live").status_code == 200
            stand.live.close()
            assert client.get("/live").status_code == 503

    asyncio.run(come_and_go())


def watched_by(receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> Stand:
    """A stand after a watcher that behaves so, whom the server left by itself."""
    stand, app = Stand(), FastAPI()
    app.include_router(stand.live.router((), write_timeout_s=0.01))
    scope = {"type": "http", "method": "GET", "path": "/live", "headers": [], "query_string": b""}

    async def watch() -> None:
        async with asyncio.timeout(10):
            await app(scope, receive, send)

    asyncio.run(watch())
    return stand


def request_of(then: dict[str, Any] | None) -> Callable[[], Awaitable[Any]]:
    """`receive` of a request without a body; then this message for ever, or silence."""
    messages = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Any:
        if not messages and then is None:
            await asyncio.Event().wait()
        return messages.pop() if messages else then

    return receive


@pytest.mark.usefixtures("quick")
def test_a_watcher_that_takes_nothing_is_given_up() -> None:
    taken = []

    async def send(message: Any) -> None:
        taken.append(message)
        if message.get("body"):
            await asyncio.Event().wait()

    assert watched_by(request_of(None), send).live._watchers == 0
    assert [message["type"] for message in taken] == ["http.response.start", "http.response.body"]


@pytest.mark.usefixtures("quick")
def test_a_watcher_that_has_hung_up_is_noticed() -> None:
    async def send(message: Any) -> None:
        pass

    assert watched_by(request_of({"type": "http.disconnect"}), send).live._watchers == 0


def served(keys: list[str]) -> FastAPI:
    """The whole application with a feed that ends at once."""
    stand = Stand()
    stand.status = Status("draining", 0, 0, 0, 0, 0)
    return create_app(stand.live, ServedModel(("m",), None, 9), ServerOptions(api_key=keys),  # type: ignore[arg-type]
                      [stand.live.router()], metrics=lambda: (b"", "text/plain"))


@pytest.mark.parametrize(("given", "status"), [
    (None, 401), ("", 401), ("Bearer", 401), ("Bearer wrong", 401), ("Basic k", 401), ("k", 401), ("Bearer k2", 401),
    ("Bearer k", 200), ("bearer other", 200),
])  # fmt: skip
def test_the_feed_is_closed_without_a_key(given: str | None, status: int) -> None:
    with TestClient(served(["k", "other"])) as client:
        answer = client.get("/live", headers={} if given is None else {"Authorization": given})
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key" and answer.headers["WWW-Authenticate"] == "Bearer"
        assert "stages" not in answer.text
    else:
        assert sent(answer.text)[0]["state"] == "draining"


def test_the_feed_is_open_where_there_are_no_keys() -> None:
    with TestClient(served([])) as client:
        assert client.get("/live").status_code == 200


@pytest.mark.parametrize("path", ["/", "/health", "/version", "/metrics", "/openapi.json"])
def test_page_and_probes_are_open_in_spite_of_keys(path: str) -> None:
    with TestClient(served(["k"])) as client:
        assert client.get(path).status_code == 200


def test_an_application_without_a_keyring_shows_nothing() -> None:
    stand, app = Stand(), FastAPI()
    stand.live.close()  # a feed would end
    app.include_router(stand.live.router())
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/live").status_code == 500


def test_the_page_needs_nothing_from_elsewhere() -> None:
    with TestClient(served([])) as client:
        page = client.get("/")
    assert page.status_code == 200 and "<title>Fullpipe</title>" in page.text
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "http://" not in page.text and "https://" not in page.text  # nothing from elsewhere
    assert "innerHTML" not in page.text
