"""The server's page in headless Chromium, over a real socket. A picture of it: see
`fullpipe_lab.studies.shoot_page`."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from placed import Placed

from fullpipe.engine import Stats
from fullpipe.events import Admitted, Attached, Emitted, Fate, Launched, Submitted
from fullpipe.messages import Event, Landed, Ready
from fullpipe.server.guard import Keyring
from fullpipe.server.hosts import Hosts
from fullpipe.server.live import Live
from fullpipe.supervision import State, Status

EVIL = "<img src=x onerror=document.title='owned'> <b>bold</b> & \u00fc"


class Server:
    """The page's router beside a chat endpoint that says `answer`, in pieces that cut lines and characters anywhere.

    bodies: what was asked. hold: set to go on past the second piece. key: asked for, if not empty.
    """

    def __init__(self) -> None:
        self.state: State = "ready"
        self.answer, self.key, self.bodies = "", "", list[dict[str, Any]]()
        self.refusal: tuple[int, str] | None = None
        self.hold = threading.Event()
        self.hung_up = threading.Event()
        self.live = Live(lambda: 3, self.status, lambda token: EVIL if token == 13 else f" w{token}", model_name="tiny")
        self.stats = Stats()
        self.live.on_start(self.stats)
        app = FastAPI()
        app.include_router(self.live.router([Depends(self.guard)]))
        app.post("/v1/chat/completions", dependencies=[Depends(self.guard)])(self.chat)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def status(self) -> Status:
        return Status(self.state, 1, 4, 10, 40, 2, "stage 1: died")

    def tell(self, *events: Event) -> None:
        for event in events:
            self.stats(event)
            self.live(event)

    def guard(self, request: Request) -> None:
        Keyring([self.key] if self.key else []).check(request.headers)

    async def chat(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        if self.refusal:
            code, message = self.refusal
            return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": None}}, code)
        return StreamingResponse(self.pieces(), media_type="text/event-stream")

    async def pieces(self) -> AsyncIterator[bytes]:
        words = self.answer.split(" ")
        chunks = [{"choices": [{"index": 0, "delta": {"content": word if k == 0 else f" {word}"},
                                "finish_reason": None}]} for k, word in enumerate(words)]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        chunks.append({"choices": [], "usage": {"completion_tokens": len(words)}})
        text = "".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        data, cut = text.encode(), len(f"data: {json.dumps(chunks[0])}\n\n") + 7
        try:
            yield data[:cut]
            while not self.hold.is_set():
                await asyncio.sleep(0.01)
            for at in range(cut, len(data), 11):
                yield data[at:at + 11]
        except asyncio.CancelledError:
            self.hung_up.set()
            raise

    def stop(self) -> None:
        self.live.close()
        self.hold.set()
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    browser.get_log("browser")
    browser.get(server.url)
    until(browser, lambda: read(browser, "#state") == "ready")
    yield browser
    browser.get("about:blank")


def until(page: Any, true: Callable[[], object]) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(page, 20, poll_frequency=0.05).until(lambda _: true())


def read(page: Any, selector: str) -> str:
    return str(page.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector))


def all_of(page: Any, selector: str) -> list[str]:
    return list(page.execute_script("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)",
                                    selector))


def ask(page: Any, text: str) -> None:
    page.find_element("id", "input").send_keys(text)
    page.find_element("id", "send").click()


def test_a_conversation_streams_and_carries_its_turns(page: Any, server: Server) -> None:
    server.answer = "Gr\u00fc\u00dfe \u4e16\u754c " + EVIL
    ask(page, "hello <i>you</i>")
    until(page, lambda: read(page, ".assistant span") == "Gr\u00fc\u00dfe")  # before the rest is sent
    assert page.find_element("id", "stop").is_displayed() and not page.find_element("id", "send").is_displayed()
    server.hold.set()
    until(page, lambda: read(page, ".assistant small").startswith(f"{len(server.answer.split(' '))} tokens"))
    assert read(page, ".assistant span") == server.answer
    ask(page, "and again")
    until(page, lambda: len(all_of(page, ".assistant small")) == 2 and all(all_of(page, ".assistant small")))
    assert all_of(page, ".user span") == ["hello <i>you</i>", "and again"]
    first, second = server.bodies
    assert first["model"] == "tiny" and first["stream"] is True
    assert second["messages"] == [{"role": "user", "content": "hello <i>you</i>"},
                                  {"role": "assistant", "content": server.answer},
                                  {"role": "user", "content": "and again"}]
    assert page.title == "Fullpipe"
    assert not page.execute_script("return document.querySelectorAll('#talk b, #talk img, #talk i').length")
    assert page.get_log("browser") == []


def test_options_reach_the_server(page: Any, server: Server) -> None:
    server.answer = "fine"
    server.hold.set()
    page.execute_script("document.querySelector('details').open = true")
    for id, text in (("system", "be brief"), ("temperature", "0.7"), ("max-tokens", "12")):
        page.find_element("id", id).clear()
        page.find_element("id", id).send_keys(text)
    ask(page, "hi")
    until(page, lambda: read(page, ".assistant small"))
    [body] = server.bodies
    assert (body["temperature"], body["max_tokens"]) == (0.7, 12)
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    page.find_element("id", "new").click()
    assert all_of(page, ".message") == []
    page.find_element("id", "max-tokens").clear()
    ask(page, "hi")
    until(page, lambda: read(page, ".assistant small"))
    assert "max_tokens" not in server.bodies[1]


def test_a_new_chat_begun_during_an_answer_knows_nothing_of_it(page: Any, server: Server) -> None:
    server.answer = "one two three"
    ask(page, "count")
    until(page, lambda: read(page, ".assistant span") == "one")
    page.execute_script("document.querySelector('details').open = true")
    page.find_element("id", "new").click()
    until(page, lambda: page.find_element("id", "send").is_displayed())
    server.hold.set()
    ask(page, "hi")
    until(page, lambda: read(page, ".assistant small"))
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "hi"}]
    assert all_of(page, ".user span") == ["hi"]


def test_stop_hangs_up(page: Any, server: Server) -> None:
    server.answer = "one two three"
    ask(page, "count")
    until(page, lambda: read(page, ".assistant span") == "one")
    page.find_element("id", "stop").click()
    until(page, lambda: "stopped" in read(page, ".assistant small"))
    assert read(page, ".assistant span") == "one" and page.find_element("id", "send").is_displayed()
    assert server.hung_up.wait(10)


def test_a_refusal_is_shown_and_the_question_may_be_asked_again(page: Any, server: Server) -> None:
    server.refusal = (429, "the <b>queue</b> is full")
    ask(page, "hi")
    until(page, lambda: read(page, ".error span") == "429: the <b>queue</b> is full")
    server.refusal, server.answer = None, "yes"
    server.hold.set()
    ask(page, "hi")
    until(page, lambda: read(page, ".assistant small"))
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "hi"}]


def test_the_pipeline_is_shown_and_moves(page: Any, server: Server) -> None:
    assert all_of(page, "[data-station] b") == ["stage 0", "stage 1", "stage 2"]
    now = server.live._clock()
    for request in (3, 4):
        server.tell(Submitted(now, request, 64, now), Admitted(now, request))
    server.tell(Launched(now, 0, [0, 1, 2], [-1, 0, 0], [5, 6, 7], [0, 1, 1], [3, 3, 4]))
    until(page, lambda: len(all_of(page, "[data-station='stage 0'] .row")) == 3)
    colours = page.execute_script("return [...document.querySelectorAll(\"[data-station='stage 0'] .row\")]"
                                  ".map(e => getComputedStyle(e).backgroundColor)")
    assert colours[0] == colours[1] != colours[2]
    server.tell(Ready(now))
    until(page, lambda: len(all_of(page, "[data-station='stage 1'] .row")) == 3)
    server.tell(Launched(now, 1, [], [], [], [], [], {4: 64}))
    until(page, lambda: all_of(page, "[data-station='stage 0'] .row") == ["64"])
    frame = page.execute_script("return getComputedStyle(document.querySelector('.row.prompt')).borderLeftColor")
    assert frame == colours[2]
    assert "#4 \u00b7 0 tokens \u00b7 1 in flight \u00b7 64 of its prompt" in all_of(page, ".request")
    server.tell(Landed(now, 1))
    until(page, lambda: all_of(page, ".row.prompt") == [])
    assert all_of(page, "[data-station='stage 0'] .row") == []
    fates: tuple[tuple[int, Fate], ...] = ((5, "hit"), (13, "miss"), (6, "hit"))
    for token, fate in fates:
        server.tell(Emitted(now, 3, token, token, 1, fate))
    until(page, lambda: len(all_of(page, ".token")) == 3)
    assert all_of(page, ".token.hit") == ["\u00b7w5", "\u00b7w6"] and all_of(page, ".token.miss") == [EVIL]
    figures = {name: read(page, f"[data-figure='{name}'] b") for name in ("hit rate", "queue", "restarts", "cache")}
    assert figures == {"hit rate": "67%", "queue": "4", "restarts": "2", "cache": "25%"}
    assert "#3 \u00b7 3 tokens \u00b7 2 in flight" in all_of(page, ".request")
    assert page.title == "Fullpipe" and page.get_log("browser") == []


def test_it_says_when_the_pipeline_is_rebuilt_and_when_the_server_is_gone(page: Any, server: Server) -> None:
    server.state = "rebuilding"
    until(page, lambda: read(page, "#state") == "rebuilding")
    assert "being rebuilt" in read(page, "#notice") and "stage 1: died" in read(page, "#notice")
    server.state = "failed"
    until(page, lambda: read(page, "#state") == "failed")
    assert "keeps trying and comes back by itself" in read(page, "#notice")
    server.state = "ready"
    until(page, lambda: read(page, "#state") == "ready" and not read(page, "#notice"))
    server.live.close()
    until(page, lambda: read(page, "#state") == "down")
    server.live._closed = False
    until(page, lambda: read(page, "#state") == "ready")  # by itself


def test_hosts_are_shown_and_how_one_is_lost_and_comes_back(page: Any, server: Server) -> None:
    assert not page.find_element("id", "several").is_displayed()  # on one machine
    placed = Placed(spare=("h4",))
    hosts = server.live._hosts = Hosts(placed, clock=lambda: 1e9)
    until(page, lambda: all_of(page, "[data-host] b") == ["h1", "h2", "h3", "h4"])
    assert all_of(page, "[data-host] .work") == ["stage 0, draft", "stage 1", "stage 2", "not used"]
    assert all_of(page, "[data-station] b") == ["stage 0 h1", "stage 1 h2", "stage 2 h3"]
    assert all_of(page, "#ways .used") == [f"10.0 ms {speed}" for speed in ["940 Mbit/s"] * 3]
    assert read(page, "[data-figure='ms planned'] b") == "23.0" and read(page, "[data-figure='ms a token'] b") == "–"
    assert not page.find_element("id", "news").is_displayed()
    hosts.on_restart("stage 1 on h2", f"stage 1 on h2 failed: {EVIL}")
    until(page, lambda: read(page, ".host.failed b") == "h2")
    placed.lose("h2")
    hosts(Attached(1))
    until(page, lambda: read(page, ".host.lost b") == "h2")
    assert "it does not answer" in read(page, ".host.lost") and not all_of(page, "[data-way='h1 h2']")
    lines = page.execute_script("return [...document.querySelectorAll('#happened li')].map(e => e.lastChild.data)")
    assert lines == ["going on with h1, h3 after 0.0 s: 31.0 ms a token planned", "lost h2: it does not answer",
                     f"stage 1 on h2 failed: {EVIL}"]
    placed.gain("h2")
    placed.replan("h1", "h2", "h3")
    until(page, lambda: not all_of(page, ".host.lost") and len(all_of(page, "#happened li")) == 4)
    assert page.title == "Fullpipe" and page.get_log("browser") == []


def test_a_key_is_asked_for_and_kept(page: Any, server: Server) -> None:
    door = page.find_element("id", "door")
    assert not door.is_displayed()
    server.key = "s\u00e9cret"
    page.refresh()
    until(page, lambda: read(page, "#state") == "locked")
    assert read(page, "#notice") == "The server asks for an API key." and all_of(page, "[data-station]") == []
    key = page.find_element("id", "key")
    key.send_keys("wrong\n")
    until(page, lambda: "does not know" in read(page, "#notice"))
    key.clear()
    key.send_keys(server.key + "\n")
    until(page, lambda: read(page, "#state") == "ready")
    assert not page.find_element("id", "door").is_displayed() and len(all_of(page, "[data-station]")) == 3
    page.refresh()
    until(page, lambda: read(page, "#state") == "ready")  # kept in the tab
    assert not page.execute_script("return document.cookie + JSON.stringify(localStorage)").strip("{}")
    page.execute_script("sessionStorage.clear()")


def test_the_chat_sends_the_key_and_asks_for_another_when_it_no_longer_fits(page: Any, server: Server) -> None:
    server.key, server.answer = "first", "yes"
    server.hold.set()
    page.refresh()
    until(page, lambda: read(page, "#state") == "locked")
    page.find_element("id", "key").send_keys("first\n")
    until(page, lambda: read(page, "#state") == "ready")
    ask(page, "hi")
    until(page, lambda: read(page, ".assistant small"))
    assert read(page, ".assistant span") == "yes"
    server.key = "second"
    ask(page, "again")
    until(page, lambda: read(page, ".error span").startswith("401"))
    assert page.find_element("id", "door").is_displayed()
    assert len(server.bodies) == 1
    page.execute_script("sessionStorage.clear()")


@pytest.mark.parametrize("num_spare", [None, 13])
def test_it_fits_a_phone(page: Any, server: Server, num_spare: int | None) -> None:
    size = page.get_window_size()
    if num_spare is not None:
        server.live._hosts = Hosts(Placed(spare=tuple(f"h{k}" for k in range(4, 4 + num_spare))))
        until(page, lambda: len(all_of(page, "[data-host]")) == 3 + num_spare)
    page.set_window_size(500, 850)
    try:
        width, shown = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width <= shown
        assert page.find_element("id", "send").rect["x"] + page.find_element("id", "send").rect["width"] <= shown
    finally:
        page.set_window_size(size["width"], size["height"])
