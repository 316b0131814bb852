"""What an HTTP request asks for that is not here is answered with where it is: a path, a method, a field's name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.routing import BaseRoute, Match, Route

from fullpipe.server.protocol.requests import ChatRequest, CompletionRequest
from fullpipe.server.protocol.tables import REFUSED

_SHOWN = 80  # characters of a path that a message repeats
_CHAT = "a chat is asked at /v1/chat/completions"
_TEXT = "a text is asked at /v1/completions"


@dataclass(frozen=True, slots=True)
class Door:
    """Says what one kind of request takes. refused: fields that are not taken, and why. elsewhere: what to use in place
    of fields that others have."""

    takes: type[BaseModel]
    refused: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def hint(self, name: str) -> str | None:
        """What somebody who sends an unknown field may have meant."""
        if name in self.elsewhere:
            return self.elsewhere[name]
        near = difflib.get_close_matches(name[:_SHOWN], [*self.takes.model_fields], n=1, cutoff=0.75)
        return f"did you mean {near[0]!r}?" if near else None


CHAT = Door(ChatRequest, REFUSED, {
    "prompt": f"a chat's prompt stands in messages; {_TEXT}", "input": "it is called messages here",
    "instructions": "say it in messages, with the role system", "system": "say it in messages, with the role system",
    "max_output_tokens": "it is called max_completion_tokens here",
    "max_new_tokens": "it is called max_completion_tokens here",
    "text": "it is called response_format here", "reasoning": "say it in chat_template_kwargs",
    "best_of": _TEXT, "suffix": _TEXT, "previous_response_id": "send the whole conversation in messages",
})
COMPLETIONS = Door(CompletionRequest, REFUSED, {
    **dict.fromkeys(("messages", "tools", "tool_choice", "chat_template_kwargs", "functions"), _CHAT),
    "input": "it is called prompt here", "top_logprobs": "it is called logprobs here, a number",
    **dict.fromkeys(("max_completion_tokens", "max_output_tokens", "max_new_tokens"), "it is called max_tokens here"),
})


# ---- paths -----------------------------------------------------------------------------------------------------------
# `create_app` puts the application's routes into its `state.places`.

_OTHERS = {
    "/v1/messages": "Anthropic's API is not spoken here; ask /v1/chat/completions",
    "/v1/load_lora_adapter": "an adapter is merged into the model when the server starts, and is for all requests",
    "/v1/unload_lora_adapter": "an adapter is merged into the model when the server starts, and is for all requests",
}


def no_such_path(request: Request) -> str:
    """Says that nothing is there, and what may have been meant."""
    path, there = _path(request), sorted(set(_told(request)))
    return f"there is no {path[:_SHOWN]!r} here{_hint(request, path, there)}. This server has {', '.join(there)}"


def no_such_method(request: Request) -> tuple[str, str]:
    """Says which methods a path takes; and those alone, for the header `Allow`."""
    taken = sorted({method for route in _routes(request) if _leads(route, request.scope, request.scope["path"])
                    for method in getattr(route, "methods", None) or ()})
    said = f"{_path(request)[:_SHOWN]} takes {' or '.join(taken)}, and no {request.method[:20]}"
    return said, ", ".join(taken)


def _hint(request: Request, path: str, there: Sequence[str]) -> str:
    if path in _OTHERS:
        return f": {_OTHERS[path]}"
    if path.startswith("/v1/v1/"):
        return ": /v1 stands twice, and one of them is enough"
    if path.endswith("/") and any(_leads(route, request.scope, path.rstrip("/")) for route in _routes(request)):
        return f": leave out the slash at the end, as in {path.rstrip('/')[:_SHOWN]}"
    near = difflib.get_close_matches(path[:_SHOWN], there, n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def _path(request: Request) -> str:
    return str(request.scope["path"]).removeprefix(request.scope.get("root_path", "")) or "/"


def _routes(request: Request) -> list[BaseRoute]:
    return list(request.app.state.places)


def _told(request: Request) -> Iterator[str]:
    """Paths that the document tells of, without those that have a name in them."""
    for route in _routes(request):
        if isinstance(route, Route) and route.include_in_schema and "{" not in route.path:
            yield route.path


def _leads(route: BaseRoute, scope: Mapping[str, Any], path: str) -> bool:
    """Whether a path is a route's, by some method."""
    return bool(path) and route.matches({**scope, "path": path})[0] is not Match.NONE
