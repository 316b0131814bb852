"""A guard stands before the application: who may come in, how much they may send, how long they may take nothing of
what is sent, and a line in the log for each."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fullpipe.options import ServerOptions
from fullpipe.server.problems import Problem, problem_of, retry_after

log = logging.getLogger("fullpipe.server")

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_DRAIN_BYTES, _DRAIN_S = 64 * 2**20, 5.0
_DRAINS = 32  # refused requests that are read on at a time: it is a courtesy, and costs what the others need
_PROBES = frozenset({"/health", "/ping", "/ready", "/metrics", "/version"})


def request_id(scope: Scope) -> str:
    """The id that the log and the caller know the request by."""
    return str(scope["fullpipe.request_id"])


class Keyring:
    """Knows who may come in. Empty: everybody."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def check(self, headers: Headers) -> None:
        """Raises `Problem` without a key that fits; takes as long whichever does, and however much of one does."""
        given = headers.getlist("authorization")
        scheme, _, key = (given[0] if len(given) == 1 else "").partition(" ")
        offered = key.strip().encode("latin-1")
        fits = [hmac.compare_digest(offered, own) for own in self._keys]
        if self._keys and not (scheme.lower() == "bearer" and any(fits)):
            raise Problem(401, "no valid API key was given; send it as `Authorization: Bearer KEY`",
                          code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def needs_key(request: Request) -> None:
    """A route that depends on it asks for a key of the application's `state.keyring`. Raises `Problem` without one."""
    keyring: Keyring = request.app.state.keyring
    keyring.check(request.headers)


class Guard:
    """Stands around the application as ASGI middleware. It bounds what comes in, gives every answer an `x-request-id`
    (the caller's own if it is fit to be printed), and turns what nobody caught into a 500 of the usual shape."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app = app
        self._options = options
        self._inside, self._draining = 0, 0  # requests that were let in, probes aside; refused ones that are read on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        scope["fullpipe.request_id"] = given if _ID.fullmatch(given) else uuid.uuid4().hex
        reply = _Reply(send, request_id(scope))
        begun = time.monotonic()
        try:
            await self._serve(scope, headers, receive, reply)
        except Exception as error:
            log.exception("%s failed", request_id(scope))
            if reply.status:
                raise  # the server closes the connection: what was begun cannot be taken back
            await problem_of(error).response()(scope, receive, reply)
        finally:
            log.info("%s %s %s %d %.3f s", request_id(scope), scope["method"], _printable(scope),
                     reply.status, time.monotonic() - begun)
        return None

    async def _serve(self, scope: Scope, headers: Headers, receive: Receive, reply: _Reply) -> None:
        counts = scope["path"].removeprefix(scope.get("root_path", "")) not in _PROBES
        problem = self._refusal(counts, headers)
        if problem is not None:
            if headers.get("expect", "").lower() != "100-continue":  # reading would ask for what is refused
                await self._drain_some(receive)
            return await problem.response()(scope, receive, reply)
        self._inside += counts
        try:
            return await self._app(scope, _Limited(receive, self._options), reply)
        finally:
            self._inside -= counts

    async def _drain_some(self, receive: Receive) -> None:
        """Nothing, while many are drained already."""
        if self._draining >= _DRAINS:
            return
        self._draining += 1
        try:
            await _drain(receive)
        finally:
            self._draining -= 1

    def _refusal(self, counts: bool, headers: Headers) -> Problem | None:
        """counts: whether it is one of those that are counted."""
        if counts and self._inside >= self._options.max_connections:
            return Problem(429, f"{self._options.max_connections} requests are being served already",
                           code="rate_limit_exceeded", headers=retry_after(1))
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._options.max_body_bytes:
            return _too_large(self._options)
        return None


class _Reply:
    """Stands for `send`, remembers the status and adds the id."""

    def __init__(self, send: Send, id: str) -> None:
        self._send = send
        self._id = id
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._id
        await self._send(message)


class _Limited:
    """Stands for `receive`, and raises `Problem` once the body is too large or late. After the body it only waits."""

    def __init__(self, receive: Receive, options: ServerOptions) -> None:
        self._receive = receive
        self._options = options
        self._deadline = asyncio.get_running_loop().time() + options.body_timeout
        self._taken = 0
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise Problem(408, f"the body did not arrive within {self._options.body_timeout:g} s",
                          headers={"Connection": "close"}) from None
        self._taken += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._taken > self._options.max_body_bytes:
            if not self._complete:
                await _drain(self._receive)
            raise _too_large(self._options)
        return message


class EventStream(Response):
    """Sends server-sent events, until they end or the reader takes nothing for `write_timeout_s`. Calls `close` then,
    and closes the generator. pieces: what goes over the wire, any number of events in each."""

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncGenerator[bytes, None], write_timeout_s: float,
                 close: Callable[[], None] = lambda: None) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._pieces = pieces
        self._write_timeout_s = write_timeout_s
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for message in self._messages():
                async with asyncio.timeout(self._write_timeout_s):
                    await send(message)
        except TimeoutError:
            log.warning("%s took nothing for %g s", scope.get("fullpipe.request_id", "-"), self._write_timeout_s)
        finally:
            self._close()
            await self._pieces.aclose()

    async def _messages(self) -> AsyncGenerator[Message, None]:
        yield {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        async for piece in self._pieces:
            yield {"type": "http.response.body", "body": piece, "more_body": True}
        yield {"type": "http.response.body", "body": b"", "more_body": False}


async def _drain(receive: Receive) -> None:
    """Read on for a while what nobody wants: a client that is still sending when the connection closes never sees the
    answer."""
    taken = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            while taken < _DRAIN_BYTES:
                message = await receive()
                taken += len(message.get("body", b""))
                if not message.get("more_body", False):  # its end, or the client has gone
                    return


def _too_large(options: ServerOptions) -> Problem:
    return Problem(413, f"the body is larger than {options.max_body_bytes} bytes", code="request_too_large",
                   headers={"Connection": "close"})


def _printable(scope: Scope) -> str:
    """The path as it was sent, which has no line ends in it."""
    return str(scope.get("raw_path", scope["path"].encode())[:200].decode("ascii", "backslashreplace"))
