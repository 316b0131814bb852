"""A request is streamed from an OpenAI-compatible server, and it is noted when each part of the answer came. No torch.

Needs httpx (the extra "load"). Whatever a server does becomes an `Answer`; nothing is raised over it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from fullpipe.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    import httpx

Endpoint = Literal["chat", "completions"]
_PATHS: dict[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_WHOLE = ("stop", "length")  # finish reasons of an answer that is as it was asked for
_DETAIL = 200  # characters of what a server says about an error


@dataclass(frozen=True, slots=True)
class Server:
    """Names a server, and the model that is asked there.

    url: "http://host:port", with "/v1" behind it or not. model: as the server calls it.

    Raises UsageError for what no request could be sent with.
    """

    url: str
    model: str
    api_key: str | None = None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise UsageError(f"{self.url!r} is no server's address", hint="For example http://127.0.0.1:8000.")
        if not (self.api_key or "").isascii() or not (self.api_key or " ").isprintable():
            raise UsageError("an API key is of printable ASCII characters", hint="Check `api_key`.")

    @property
    def root(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(slots=True)
class Answer:
    """Holds what came back. Times in seconds since the request was sent.

    arrivals: of each chunk that brought text; one may hold several tokens, and characters that take several tokens
    come with the last of them. end_s: when it ended, well or not. tokens, prompt_tokens: as `usage` counts them,
    None where the server did not say. error: the kind of failure, None for a whole answer; detail: more of it.
    """

    arrivals: list[float] = field(default_factory=list)
    end_s: float = 0.0
    prompt_tokens: int | None = None
    tokens: int | None = None
    finish: str | None = None
    text: str = ""
    error: str | None = None
    detail: str = ""

    def fail(self, kind: str, detail: object = "") -> None:
        """The first failure counts."""
        if self.error is None:
            self.error, self.detail = kind, str(detail)[:_DETAIL]


def require_httpx() -> None:
    """Raises MissingExtra where no requests can be made."""
    try:
        import httpx  # noqa: F401
    except ImportError:
        raise MissingExtra("putting load on a server needs httpx", hint="pip install 'fullpipe[load]'") from None


def served_model(url: str, api_key: str | None) -> str:
    """What the server at `url` calls its first model. Raises UsageError where none answers."""
    require_httpx()
    import httpx

    server = Server(url, "", api_key)
    hint = "Start one (`fullpipe serve`), and check `url` and `api_key`."
    try:
        response = httpx.get(f"{server.root}/v1/models", headers=server.headers, timeout=30)
        return str(response.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UsageError(f"no OpenAI-compatible server at {url}: {error}", hint=hint) from None
    except (ValueError, LookupError, TypeError):
        raise UsageError(f"{server.root}/v1/models names no model", hint=f"Name it with `model`. {hint}") from None


def body_of(server: Server, endpoint: Endpoint, prompt: str, options: dict[str, Any]) -> dict[str, Any]:
    """The request's JSON: a streamed one that ends with its usage."""
    question = {"messages": [{"role": "user", "content": prompt}]} if endpoint == "chat" else {"prompt": prompt}
    return {"model": server.model, **question, **options, "stream": True, "stream_options": {"include_usage": True}}


async def ask(client: httpx.AsyncClient, server: Server, endpoint: Endpoint, body: dict[str, Any],
              limit_s: float) -> Answer:
    """Send it and read its stream to the end, for `limit_s` seconds at most."""
    import httpx

    answer, sent = Answer(), time.perf_counter()
    try:
        async with (asyncio.timeout(limit_s), client.stream("POST", server.root + _PATHS[endpoint], json=body,
                                                             headers=server.headers) as response):
            await _read(response, answer, sent)
    except TimeoutError:
        answer.fail("timeout", f"no end after {limit_s:g} s")
    except httpx.ConnectError as error:
        answer.fail("no connection", error)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        answer.fail("cut off", error or type(error).__name__)
    answer.end_s = time.perf_counter() - sent
    return answer


async def _read(response: httpx.Response, answer: Answer, sent: float) -> None:
    if response.status_code != 200:
        answer.fail(f"status {response.status_code}", _reason(await response.aread()))
        return
    done = False
    async for data in events(response.aiter_bytes()):
        done = done or data == b"[DONE]"
        if not done:
            _take(answer, data, time.perf_counter() - sent)
    _check_whole(answer, done)


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event.

    Lines are split as bytes: httpx's own splitting of text also ends lines at characters such as U+2028, which JSON
    may hold as they are.
    """
    rest, data = b"", list[bytes]()
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []


def _take(answer: Answer, data: bytes, now: float) -> None:
    try:
        event = json.loads(data)
        if (error := event.get("error")) is not None:
            answer.fail("error event", error.get("message", error) if isinstance(error, dict) else error)
        for choice in event.get("choices") or ():
            _take_choice(answer, choice, now)
        if usage := event.get("usage"):
            answer.prompt_tokens, answer.tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (ValueError, LookupError, TypeError, AttributeError):
        answer.fail("nonsense", data.decode(errors="replace"))


def _take_choice(answer: Answer, choice: dict[str, Any], now: float) -> None:
    piece = (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""
    if piece:
        answer.arrivals.append(now)
        answer.text += piece
    answer.finish = choice.get("finish_reason") or answer.finish


def _check_whole(answer: Answer, done: bool) -> None:
    """A stream that ended without an error may still be no whole answer."""
    if not done:
        answer.fail("cut off", "the stream ended without [DONE]")
    elif answer.finish not in _WHOLE:
        answer.fail(f"ended: {answer.finish}")
    elif answer.tokens is None:
        answer.fail("no usage", "the server does not count tokens in streams (stream_options.include_usage)")


def _reason(content: bytes) -> str:
    """What an error's body says: its message where it has OpenAI's shape."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return content.decode(errors="replace")
