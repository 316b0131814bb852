"""Options of the command line say what an answer must be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fullpipe.errors import UsageError
from fullpipe.options import option
from fullpipe.request import Structured

_SHOWN = 60  # characters of what was given that a message repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureOptions:
    """At most one of them is given."""

    json_schema: str | None = option(None, "Answer in JSON of this schema: its text, or a file.",
                                     metavar="FILE_OR_TEXT")
    regex: str | None = option(None, "Answer with a text that this regular expression matches.")
    choice: tuple[str, ...] = option((), "Answer with this text, or with another if it is repeated.")
    grammar: str | None = option(None, "Answer in this grammar, Lark's notation or GBNF: its text, or a file.",
                                 metavar="FILE_OR_TEXT")

    def structured(self) -> Structured | None:
        """What was asked for, if anything. Raises UsageError for several, for files that cannot be read, and for what
        can be neither a file nor a text."""
        given = [made for made in (
            None if self.json_schema is None else Structured("json", _schema(self.json_schema)),
            None if self.regex is None else Structured("regex", self.regex),
            Structured("choice", json.dumps(self.choice)) if self.choice else None,
            None if self.grammar is None else Structured("grammar", _grammar(self.grammar)),
        ) if made is not None]
        if len(given) > 1:
            raise UsageError("an answer has one structure",
                             hint="Give one of --json-schema, --regex, --choice and --grammar.")
        return given[0] if given else None


def _schema(given: str) -> str:
    text = _read(given)
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = given if len(given) <= _SHOWN else f"{given[:_SHOWN]}..."
        if text != given:
            raise UsageError(f"--json-schema: {shown} is not JSON ({error})", hint="Name a file with a JSON schema.") \
                from None
        if given.lstrip()[:1] in ("{", "["):
            raise UsageError(f"--json-schema: {shown} is not JSON ({error})",
                             hint="Put it into single quotes for the shell, or into a file.") from None
        raise UsageError(f"--json-schema: {shown} is not there, and is no JSON either",
                         hint="Name a file with a JSON schema, or give its text in single quotes.") from None
    return text


def _grammar(given: str) -> str:
    """Every rule, in either notation, has a colon."""
    text = _read(given)
    if text == given and ":" not in given:
        raise UsageError(f"--grammar: {given[:_SHOWN]} is not there, and is no grammar either",
                         hint="Name a file with a grammar in Lark's notation or GBNF, or give its text.")
    return text


def _read(text: str) -> str:
    """What a file holds; what is no file's name is the text itself."""
    try:
        if "\n" in text or not Path(text).is_file():
            return text
        return Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # too long for a name, or not UTF-8
        if text.lstrip().startswith("{") or len(text) > 255:
            return text
        raise UsageError(f"cannot read {text}: {error}") from error
