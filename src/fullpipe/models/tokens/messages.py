"""A conversation, however a client wrote it down, in the one form that chat templates are given.

Clients send text, parts or null, replay answers with tool calls and reasoning, and use fields that OpenAI has given up.
Here that becomes: `content` is a text or a list of text parts, never null; the arguments of a tool call are an object,
or `CutOff`; a function call is a tool call. What templates have no word for is refused, with the place where it stands.
Fields that nobody here knows are left: a template may read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fullpipe.errors import MessageError

Message = Mapping[str, Any]
"""One turn: "role" and "content", and what a client may send besides; or an object of pydantic's that has them."""

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Parts that are text, and the field it stands in."""

_REASONING = ("reasoning_content", "reasoning", "thinking")  # one thing; templates and servers call it as they like


class CutOff(str):
    """Is the arguments of a call that are no JSON: an answer was cut off in them, and came back as it was. Templates
    show it as it stands, which is what the model said (`template.ChatTemplate`)."""

    __slots__ = ()


def conversation(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages in that form; what was given is not changed. Raises `MessageError`."""
    return [_turn(f"messages[{index}]", message) for index, message in enumerate(messages)]


def is_message(value: Any) -> bool:
    """Whether it is one turn: a mapping, or an object like those that the `openai` package answers with."""
    return isinstance(value, Mapping) or hasattr(value, "model_dump")


def text_of(message: Mapping[str, Any]) -> str:
    """What a message in that form says, its parts joined as vLLM joins them."""
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _turn(where: str, message: Any) -> dict[str, Any]:
    said = {key: value for key, value in _mapping(where, message).items() if value is not None}
    role = said.get("role")
    if not isinstance(role, str) or not role:
        raise MessageError(f"{where}.role", "must say who speaks", hint='As in {"role": "user", "content": "Hello"}.')
    if role == "function":
        role = said["role"] = "tool"
    content = _content(f"{where}.content", said.get("content"))
    if not content and isinstance(said.get("refusal"), str):
        content = said["refusal"]
    if not content and not isinstance(said.get("content"), str) and role in ("system", "developer", "user"):
        raise MessageError(f"{where}.content", f"must be a text, or parts with one, in a message of role {role!r}")
    said["content"] = content or ""
    if calls := list(_calls(where, said)):
        said["tool_calls"] = calls
    if (reasoning := next((said[name] for name in _REASONING if name in said), None)) is not None:
        said |= dict.fromkeys(_REASONING, reasoning)
    return {key: value for key, value in said.items() if key not in ("refusal", "function_call")
            and (key != "tool_calls" or value)}


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    plain = value.model_dump() if hasattr(value, "model_dump") else value
    if not isinstance(plain, Mapping):
        raise MessageError(where, f"must be a message (got {type(value).__name__})",
                           hint='As in {"role": "user", "content": "Hello"}.')
    return plain


def _content(where: str, content: Any) -> str | list[dict[str, str]]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise MessageError(where, f"must be a text, a list of parts or null (got {type(content).__name__})")
    return [{"type": "text", "text": _text(f"{where}[{index}]", part)} for index, part in enumerate(content)]


def _text(where: str, part: Any) -> str:
    plain = _mapping(where, part)
    kind = plain.get("type")
    if (field := TEXT_PARTS.get(str(kind))) is None:
        raise MessageError(f"{where}.type", f"parts of type {str(kind)[:60]!r} are not supported; only text is")
    if not isinstance(plain.get(field), str):
        raise MessageError(f"{where}.{field}", "must be a text")
    return str(plain[field])


def _calls(where: str, said: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The tool calls of an answer; a function call, as OpenAI had them before, is one without an id."""
    if function := said.get("function_call"):
        yield {"type": "function", "function": _function(f"{where}.function_call", function)}
    calls = said.get("tool_calls", ())
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise MessageError(f"{where}.tool_calls", f"must be a list (got {type(calls).__name__})")
    for index, call in enumerate(calls):
        place = f"{where}.tool_calls[{index}]"
        plain = _mapping(place, call)
        yield {**plain, "function": _function(f"{place}.function", plain.get("function"))}


def _function(where: str, function: Any) -> dict[str, Any]:
    plain = _mapping(where, function)
    if not isinstance(plain.get("name"), str):
        raise MessageError(f"{where}.name", "must be a text")
    return {**plain, "arguments": _arguments(plain.get("arguments"))}


def _arguments(arguments: Any) -> Any:
    """Clients send JSON in a string; templates write JSON themselves."""
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return CutOff(arguments)
