"""A part of a text has a form, and the rest is free: grammars for that, in llguidance's dialect of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from fullpipe.request import Structured
from fullpipe.server import reasoning

_ANY = r"/(.|\n)*/"


def behind_thoughts(structured: Structured, special: Collection[str], *, optional: bool) -> Structured | None:
    """The structure of an answer behind thoughts, which end with their mark and begin with one where they are optional;
    None for a structure that cannot be a part of another.

    special: texts of special tokens, which a grammar must name as such.
    """
    answer = _part(structured)
    if answer is None:
        return None
    begin, end = (_mark(mark, special) for mark in reasoning.MARKS)
    thoughts = f"thoughts: {_ANY} {end}" if reasoning.END in special else f"thoughts[suffix={end}]: {_ANY}"
    start = f"({begin} thoughts breaks)?" if optional else "thoughts breaks"
    return _grammar(f"start: {start} answer", thoughts, r'breaks: "\n"? "\n"?', f"answer: {answer}")


def free_calls(call: dict[str, Any], strict: Mapping[str, dict[str, Any]], begin: str, end: str,
               special: Collection[str], *, one: bool) -> Structured:
    """Any text in which calls stand on a line of their own between marks, or which is a call as a whole.

    call: the schema of one. strict: by the names of functions, the schemas to which arguments are held in a whole text
    too. one: there is at most one call.
    """
    head, tail = _mark(begin, special), _mark(end, special)
    whole = [rule for number, (name, schema) in enumerate(strict.items()) for rule in (
        rf'name_{number}[lazy]: /\s*(```(json)?\s*)?\{{\s*"name"\s*:\s*"{_pattern(re.escape(name))}"/',
        f"whole_{number}: name_{number} BEFORE %json {_dumped(schema)} AFTER")]
    starts = [*(f"whole_{number}" for number in range(len(strict))), f"call{'?' if one else '*'} rest"]
    return _grammar(
        f"start: {' | '.join(starts)}", "rest: TEXT", f"TEXT: {_ANY}",
        f"head: TEXT {head}" if begin in special else f"head[lazy]: TEXT {head}",
        rf'call: head "\n" body "\n" {tail}', f"body: %json {_dumped(call)}", *whole,
        r'BEFORE: /\s*,\s*"(arguments|parameters)"\s*:\s*/', r"AFTER: /\s*\}\s*(```)?\s*/")


def _grammar(*rules: str) -> Structured:
    return Structured("grammar", "\n".join(["%llguidance {}", *rules]))


def _part(structured: Structured) -> str | None:
    match structured.kind:
        case "json":
            return f"%json {_plain(structured.text)}"
        case "json_object":
            return '%json {"type": "object"}'
        case "choice":
            return " | ".join(_plain(json.dumps(choice)) for choice in json.loads(structured.text))
        case "regex":
            return f"/{_pattern(structured.text)}/"
    return None


def _pattern(text: str) -> str:
    """A regular expression as it stands between slashes."""
    return re.sub(r"(?s)\\.|[/\n]", lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]), text)


def _mark(mark: str, special: Collection[str]) -> str:
    """A special token by its name, or a text."""
    return mark if mark in special else _plain(json.dumps(mark))


def _dumped(value: Any) -> str:
    return _plain(json.dumps(value, ensure_ascii=False))


def _plain(text: str) -> str:
    """JSON without the character with which a grammar would name a token."""
    return text.replace("<", r"\u003c")
