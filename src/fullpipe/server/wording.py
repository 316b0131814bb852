"""What pydantic finds wrong with a value is said in words for whoever sent it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SHOWN = 60
"""Characters of a caller's own value that a message repeats."""

_KINDS = {
    "string_type": "a string", "list_type": "a list", "dict_type": "an object", "model_type": "an object",
    "model_attributes_type": "an object", "bool_type": "true or false", "int_type": "a whole number",
    "int_from_float": "a whole number", "float_type": "a number",
}
_SHORT = {"too_short": "entry", "string_too_short": "character"}
_LONG = {"too_long": "entry", "string_too_long": "character"}
_PATTERNS = {
    "^[0-9]{1,9}$": "is no id of a token; names here are whole numbers, as in {\"50256\": -100}",
    "^[a-zA-Z0-9_.:/-]{1,256}$": "must be of letters, digits and _ . : / -, 256 at most",
}


def kind_said(error: Mapping[str, Any]) -> str | None:
    """What kind of value should stand there, where one of another kind does; None: the kind is right."""
    return _KINDS.get(error["type"])


def fault_said(error: Mapping[str, Any]) -> str:
    """What is wrong with a value of the right kind."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _SHORT and "min_length" in context:
        least = context["min_length"]
        return "must not be empty" if least == 1 else f"must have at least {_counted(least, _SHORT[kind])}"
    if kind in _LONG and "max_length" in context:
        return _too_many(context["max_length"], _LONG[kind])
    if kind == "none_required":
        return "is not supported here; leave it out"
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], f"must match the pattern {context['pattern']}")
    if kind == "union_tag_invalid":
        return f"there is no type {str(context['tag'])[:SHOWN]!r} here; it must be one of {context['expected_tags']}"
    if kind == "union_tag_not_found":
        return "must be an object that says its type, as text, under \"type\""
    said = re.sub(r"^(Input|Value|List|String) should ", "must ", str(error["msg"]))
    return said.removeprefix("Value error, ")


def _too_many(most: int, what: str) -> str:
    return f"must have at most {_counted(most, what)}" if most else "must be empty"


def _counted(number: int, what: str) -> str:
    many = {"entry": "entries", "character": "characters"}
    return f"{number} {what if number == 1 else many[what]}"
