"""When something cannot be done, the answer has one shape for every 4xx and 5xx, OpenAI's."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse

from fullpipe.errors import FullpipeError, Overloaded, PromptError, StructureError, Unavailable, UsageError, without
from fullpipe.server.protocol.requests import ChatRequest, CompletionRequest
from fullpipe.server.protocol.tables import REFUSED

log = logging.getLogger("fullpipe.server")

TOO_LONG = "context_length_exceeded"
_ENDING_S = 1.0  # until a server that is started anew, or its neighbour, may answer
_FIELDS = {*ChatRequest.model_fields, *CompletionRequest.model_fields} - REFUSED.keys()
_SHOWN = 60  # characters of a caller's own value that a message repeats


class Error(BaseModel):
    """Says what was wrong.

    param: the field at fault, as in "messages[0].role"; null where none is. code: for programs; null: none.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: Error


class Problem(HTTPException):
    """Is answered as an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.error = Error(message=message, type=_type_of(status), param=param, code=code)

    def event(self) -> str:
        """The body's JSON."""
        return ErrorBody(error=self.error).model_dump_json()

    def response(self, **more: Any) -> JSONResponse:
        """more: further top-level fields of the body, beside `error`."""
        return JSONResponse({"error": self.error.model_dump(), **more}, self.status_code, headers=self.headers)


def problem_of(error: Exception, refused: Mapping[str, str] = REFUSED) -> Problem:
    """How an exception is told to the caller. What is no mistake of the caller and no state of the service is a 500
    that does not show its inside. refused: fields of the request that are not taken, and why."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, StarletteHTTPException):
        return Problem(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors(), error.body, refused)
    if isinstance(error, Unavailable):
        return _unavailable(error)
    if isinstance(error, UsageError):
        return Problem(400, told(error), param=error.param,
                       code="invalid_prompt" if isinstance(error, PromptError) else None)
    return Problem(500, "the server failed on this request", code="internal_error")


def failure(reason: str | None, error: str, cause: BaseException | None = None) -> Problem | None:
    """What is told in place of an answer that ended so; None if it is one, or still runs. A server that is told to end
    cuts off what is left ("abort"): another may answer."""
    if reason == "error" and isinstance(cause, StructureError):
        return Problem(400, told(cause), code="structure_error")
    if reason == "error":
        return Problem(500, f"the request failed: {error or 'the engine gave no reason'}", code="engine_error")
    if reason == "abort":
        return Problem(503, "the server is ending, and has cut the answer off", code="service_unavailable",
                       headers=retry_after(_ENDING_S))
    return None


def told(error: FullpipeError) -> str:
    """What a caller reads. Of the hint that is what a caller can do; what only an operator can give is logged."""
    hint = without(error.hint or "", _FIELDS.__contains__)
    if error.hint and hint != error.hint.replace("`", ""):
        log.info("%s; for the operator: %s", error.message, error.hint)
    ends = "" if error.message.endswith((".", "!", "?")) else "."
    return f"{error.message}{ends} {hint}" if hint else error.message


def retry_after(seconds: float) -> dict[str, str]:
    """The header, in whole seconds and at least one."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def _unavailable(error: Unavailable) -> Problem:
    full = isinstance(error, Overloaded)
    return Problem(429 if full else 503, told(error), code="rate_limit_exceeded" if full else "service_unavailable",
                   headers=retry_after(error.retry_after_s))


def _type_of(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")


def _invalid(errors: Sequence[Any], body: Any, refused: Mapping[str, str]) -> Problem:
    """The first thing that is wrong with a body; of the branches of a union, the one that came furthest."""
    first = errors[0]
    where = _path(first, body)
    for other in errors[1:]:
        path = _path(other, body)
        if path[: len(where)] == where and len(path) > len(where):
            first, where = other, path
    if where and where[0] in refused:
        field = str(where[0])
        return Problem(400, f"{field!r} is not supported: {refused[field]}", param=field, code="unsupported_parameter")
    param = _spelled(where) if where else None
    return Problem(400, _message(first, where, param), param=param,
                   code="unknown_parameter" if first["type"] == "extra_forbidden" else None)


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Where in the body the fault is. pydantic puts the names of union branches in between: what the body does not
    have is one of those, except at the very end, where it is a field that is missing."""
    path: list[str | int] = []
    steps = list(error["loc"])[1:]
    for number, step in enumerate(steps):
        if _has(body, step):
            path.append(step)
            body = body[step]
        elif error["type"] == "missing" and number == len(steps) - 1:
            path.append(step)
    return path


def _has(value: Any, step: str | int) -> bool:
    if isinstance(value, dict):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and step < len(value)


def _spelled(path: Sequence[str | int]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text if len(text) <= 2 * _SHOWN else text[: 2 * _SHOWN] + "..."


def _message(error: Mapping[str, Any], path: Sequence[str | int], param: str | None) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown field {param!r}"
    if error["type"] == "missing":
        return f"the field {param!r} is missing" if param else "the body is empty; a JSON object is needed"
    if path and path[-1] == "type" and isinstance(error.get("input"), str) and "content" in path:
        return f"{param}: parts of type {error['input'][:_SHOWN]!r} are not supported; only text is"
    return f"{param or 'the body'}: {error['msg']}"
