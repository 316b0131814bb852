"""What clients ask of the form of a text, in OpenAI's fields and in vLLM's, becomes a `Structured`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from fullpipe.request import Structured
from fullpipe.server.problems import Problem
from fullpipe.server.protocol.forms import JsonFormat, SchemaFormat, Tool
from fullpipe.server.protocol.requests import Options

Asked = tuple[str, Structured]
"""The field that asks for it, for who has to blame it; and the structure."""


def asked_structure(body: Options) -> Asked | None:
    """What a request asks of its text; None where it may be any. Raises `Problem` for more than one such demand, and
    for a schema that is none."""
    first, *more = [*_asked(body), None]
    if first is not None and more[0] is not None:
        other = more[0][0]
        raise Problem(400, f"{other}: a text can have one form, and {first[0]} asks for one already", param=other)
    return first


def _asked(body: Options) -> Iterator[Asked]:
    match body.response_format:
        case JsonFormat():
            yield "response_format", Structured("json_object")
        case SchemaFormat(json_schema=asked):
            yield "response_format", Structured("json", _dumped(asked.schema_))
    yield from _of_vllm("guided_", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)
    if (asks := body.structured_outputs) is not None:
        found = [*_of_vllm("structured_outputs.", asks.json_, asks.regex, asks.choice, asks.grammar)]
        if asks.json_object:
            found.append(("structured_outputs.json_object", Structured("json_object")))
        if not found:
            raise Problem(400, "structured_outputs: says nothing of the text; give json, regex, choice, grammar or "
                               "json_object", param="structured_outputs")
        yield from found


def _of_vllm(prefix: str, schema: str | dict[str, Any] | None, regex: str | None, choice: list[str] | None,
             grammar: str | None) -> Iterator[Asked]:
    if schema is not None:
        yield f"{prefix}json", Structured("json", _schema(f"{prefix}json", schema))
    if regex is not None:
        yield f"{prefix}regex", Structured("regex", regex)
    if choice is not None:
        yield f"{prefix}choice", Structured("choice", _dumped(choice))
    if grammar is not None:
        yield f"{prefix}grammar", Structured("grammar", grammar)


def _schema(field: str, given: str | dict[str, Any]) -> str:
    """A schema's text; it may have been given as one."""
    if isinstance(given, dict):
        return _dumped(given)
    try:
        found = json.loads(given)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"{field}: must be a JSON schema, and is not JSON ({error})", param=field) from None
    if not isinstance(found, dict):
        raise Problem(400, f"{field}: must be a JSON schema, an object", param=field)
    return _dumped(found)


# ---- of calls --------------------------------------------------------------------------------------------------------


def required_calls(tools: Sequence[Tool], parallel: bool) -> Structured:
    """One call or more of these tools, as a list; vLLM's form of it. parallel: there may be more than one."""
    call = calls_schema(tools, "parameters")
    defined = {"$defs": call.pop("$defs")} if "$defs" in call else {}
    return Structured("json", _dumped({"type": "array", "minItems": 1, **({} if parallel else {"maxItems": 1}),
                                       "items": call, **defined}))


def calls_schema(tools: Sequence[Tool], arguments: str, *, strict: bool = False) -> dict[str, Any]:
    """The schema of one call of any of these tools. arguments: what the call calls them. strict: functions that are not
    strict may have any arguments."""
    own = {tool.function.name: {"type": "object"} if strict and not tool.function.strict else arguments_of(tool)
           for tool in tools}
    calls = [{"type": "object", "required": ["name", arguments], "additionalProperties": False, "properties": {
        "name": {"type": "string", "enum": [name]}, arguments: {"$ref": _place(name)} if _refers(schema) else schema}}
        for name, schema in own.items()]
    defined = {name: _moved(schema, _place(name)) for name, schema in own.items() if _refers(schema)}
    return {"anyOf": calls, **({"$defs": defined} if defined else {})}


def named_call(tool: Tool) -> Structured:
    """The arguments of one call of this tool."""
    return Structured("json", _dumped(arguments_of(tool)))


def arguments_of(tool: Tool) -> dict[str, Any]:
    """Their schema. As with OpenAI, a function of which nothing is said takes none."""
    given = tool.function.parameters
    return {"type": "object", "properties": {}, "additionalProperties": False} if given is None else given


def _place(name: str) -> str:
    """Where the schema of a function's arguments stands, if it refers to itself; a JSON pointer."""
    return f"#/$defs/{name.replace('~', '~0').replace('/', '~1')}"


def _refers(schema: Any) -> bool:
    return any(map(_is_own, _references(schema)))


def _moved(schema: Any, place: str) -> Any:
    """The schema with its references to itself as they are when it stands at another place."""
    if isinstance(schema, dict):
        return {key: place + value[1:] if key == "$ref" and _is_own(value)
                else value if _says_values(key, value) else _moved(value, place) for key, value in schema.items()}
    return [_moved(value, place) for value in schema] if isinstance(schema, list) else schema


def _references(schema: Any) -> Iterator[Any]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "$ref":
                yield value
            if not _says_values(key, value):
                yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _is_own(reference: Any) -> bool:
    """Whether it leads to a place in the same schema."""
    return reference == "#" or (isinstance(reference, str) and reference.startswith("#/"))


def _says_values(key: str, value: Any) -> bool:
    """Whether a keyword's value is an example, in which nothing is a reference. An object may also be a property's
    schema, of that name."""
    return key in ("const", "enum", "default", "examples") and not isinstance(value, dict)


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
