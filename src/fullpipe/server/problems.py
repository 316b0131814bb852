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
from fullpipe.server.places import CHAT, COMPLETIONS, Door
from fullpipe.server.wording import SHOWN, fault_said, kind_said

log = logging.getLogger("fullpipe.server")

TOO_LONG = "context_length_exceeded"
_ENDING_S = 1.0  # until a server that is started anew, or its neighbour, may answer
_FIELDS = {*CHAT.takes.model_fields, *COMPLETIONS.takes.model_fields} - CHAT.refused.keys()


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


def problem_of(error: Exception, door: Door = CHAT) -> Problem:
    """How an exception is told to the caller. What is no mistake of the caller and no state of the service is a 500
    that does not show its inside. door: what the request may hold."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, StarletteHTTPException):
        return Problem(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors(), error.body, door)
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


def _invalid(errors: Sequence[Any], body: Any, door: Door) -> Problem:
    """The first thing that is wrong with a body; of the branches of a union, the one that came furthest, and of two
    that came as far the one that is for a value of this kind."""
    first = errors[0]
    where = _path(first, body)
    for other in errors[1:]:
        path = _path(other, body)
        better = _is_of_wrong_kind(first) and not _is_of_wrong_kind(other)
        if path[: len(where)] == where and (len(path) > len(where) or better):
            first, where = other, path
    if (name := _refused(first, where, door.refused)) is not None:
        return Problem(400, f"{name!r} is not supported: {door.refused[name]}", code="unsupported_parameter",
                       param=name if where[:1] == [name] else _spelled(where))
    param = _spelled(where) if where else None
    kinds = [said for error in errors if _path(error, body) == where and (said := kind_said(error))]
    if first["type"] != "extra_forbidden":
        return Problem(400, _message(first, where, param, kinds), param=param)
    hint = door.hint(str(where[0])) if len(where) == 1 else None
    return Problem(400, f"unknown field {param!r}{f'; {hint}' if hint else ''}", param=param, code="unknown_parameter")


def _is_of_wrong_kind(error: Mapping[str, Any]) -> bool:
    """Whether a value is of the wrong kind altogether."""
    return kind_said(error) is not None


def _refused(error: Mapping[str, Any], path: Sequence[str | int], refused: Mapping[str, str]) -> str | None:
    """Which of the refused fields is at fault, if one is: a field of the request, one inside another, or a type."""
    tag = [str(error["ctx"]["tag"])] if error["type"] == "union_tag_invalid" else []
    return next((name for name in map(_dotted, (path[:1], path, [*path, *tag])) if name in refused), None)


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(step for step in path if isinstance(step, str))


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Where in the body the fault is. pydantic puts the names of union branches in between. What the body does not have
    is one of those, except at the very end, where it is a field that is missing; and a name may be both, a field and
    the type that chooses the branch: it is a type where the end does not fit otherwise."""
    path, fits = _walked(error, body, types=False)
    if not fits:
        other, fits = _walked(error, body, types=True)
        path = other if fits else path
    return path


def _walked(error: Mapping[str, Any], body: Any, *, types: bool) -> tuple[list[str | int], bool]:
    """The path, and whether the last step is in it. types: a step that is the type of where it stands is no field."""
    path: list[str | int] = []
    steps, fits = list(error["loc"])[1:], True
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        fits = _has(body, step) if error["type"] != "missing" or not last else not _has(body, step)
        if types and isinstance(body, dict) and body.get("type") == step and not last:
            continue
        if _has(body, step):
            path.append(step)
            body = body[step]
        elif error["type"] == "missing" and last:
            path.append(step)
    return path, fits


def _has(value: Any, step: str | int) -> bool:
    if isinstance(value, dict):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and step < len(value)


def _spelled(path: Sequence[str | int]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text if len(text) <= 2 * SHOWN else text[: 2 * SHOWN] + "..."


def _message(error: Mapping[str, Any], path: Sequence[str | int], param: str | None, kinds: Sequence[str]) -> str:
    """kinds: what the value might have been."""
    if error["type"] == "missing":
        return f"the field {param!r} is missing" if param else "the body is empty; a JSON object is needed"
    if path and path[-1] == "type" and isinstance(error.get("input"), str) and "content" in path:
        return f"{param}: parts of type {error['input'][:SHOWN]!r} are not supported; only text is"
    said = f"must be {' or '.join(dict.fromkeys(kinds))}" if _is_of_wrong_kind(error) else fault_said(error)
    return f"{param or 'the body'}: {said}"
