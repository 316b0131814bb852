"""A server that speaks OpenAI's API by script: what it says to a prompt, and how it fails, stands in the prompt."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

KEY = "open sesame"


@dataclass
class Fake:
    """bodies: what it was asked, in order of arrival. at_once: requests under way, and the most there ever were.

    gate: while it is closed, an answer stays open after its first chunk.
    """

    url: str = ""
    key: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most: int = 0
    gate: threading.Event = field(default_factory=threading.Event)

    async def models(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "no such key"}}, 401)
        return JSONResponse({"data": [{"id": "fake-1"}, {"id": "fake-2"}]})

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        if "refuse" in prompt:
            return JSONResponse({"error": {"message": "the queue is full", "type": "overloaded"}}, 429)
        if "break" in prompt:
            return Response("<html>oh</html>", 502)
        return StreamingResponse(self._counted(prompt, "prompt" in body), media_type="text/event-stream")

    async def about(self, request: Request) -> Response:
        """What a server tells beside its answers: that it is there, its version, its counters."""
        if request.url.path == "/version":
            return JSONResponse({"version": "0.0-fake"})
        asked = len(self.bodies)
        return Response("# TYPE fullpipe_stage_busy_seconds counter\n"
                        f'fullpipe_stage_busy_seconds_total{{model_name="m",station="stage 0"}} {asked / 1000}\n'
                        f'fullpipe_stage_busy_seconds_total{{model_name="m",station="stage 1"}} {asked / 500}\n'
                        "# TYPE fullpipe_state gauge\nfullpipe_state 1\n")

    async def _counted(self, prompt: str, plain: bool) -> AsyncIterator[bytes]:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            async for event in script(prompt, plain):
                yield event
                await asyncio.sleep(0)
                while b"wait" in event and not self.gate.is_set():
                    await asyncio.sleep(0.005)
        finally:
            self.at_once -= 1


async def script(prompt: str, plain: bool) -> AsyncIterator[bytes]:
    """Three chunks of text with five tokens, unless a word of the prompt spoils it."""
    if not plain:
        yield data(choice({"role": "assistant", "content": ""}))
    pieces = ["one", " two\u2028", " three"] if "wait" not in prompt else ["wait", " go"]
    for place, piece in enumerate(pieces):
        yield data({"choices": [{"index": 0, "text": piece, "finish_reason": None}]} if plain
                   else choice({"content": piece}))
        if place == 0 and "error" in prompt:
            yield data({"error": {"message": "stage 1 failed", "type": "server_error"}})
            return
        if place == 0 and "nonsense" in prompt:
            yield b"data: {truncated\n\n"
        if place == 0 and "cut" in prompt:
            return
    reason = "abort" if "abort" in prompt else "length"
    yield data({"choices": [{"index": 0, "text": "", "finish_reason": reason}]} if plain else choice({}, reason))
    if "uncounted" not in prompt:
        yield data({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}})
    yield b"data: [DONE]\n\n"


def choice(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], "usage": None}


def data(event: dict[str, Any]) -> bytes:
    return f": a comment\r\ndata: {json.dumps(event, ensure_ascii=False)}\r\n\r\n".encode()


def application(fake: Fake) -> Starlette:
    answering, telling = ("/v1/chat/completions", "/v1/completions"), ("/ready", "/health", "/version", "/metrics")
    return Starlette(routes=[Route("/v1/models", fake.models), *(Route(path, fake.about) for path in telling),
                             *(Route(path, fake.answer, methods=["POST"]) for path in answering)])


@contextmanager
def serving(key: str | None = None) -> Iterator[Fake]:
    fake = Fake(key=key)
    server = uvicorn.Server(uvicorn.Config(application(fake), log_level="critical", lifespan="off",
                                           timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield fake
        finally:
            fake.gate.set()
            server.should_exit = True
            thread.join()


if __name__ == "__main__":  # fake_openai.py PORT: as a process of its own
    uvicorn.run(application(Fake()), port=int(sys.argv[1]), log_level="critical", lifespan="off")
