"""Options of the command line say what an answer must be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fullpipe.errors import UsageError
from fullpipe.options import option
from fullpipe.request import Structured


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
        """What was asked for, if anything. Raises UsageError for several, and for files that cannot be read."""
        given = [made for made in (
            None if self.json_schema is None else Structured("json", _read(self.json_schema)),
            None if self.regex is None else Structured("regex", self.regex),
            Structured("choice", json.dumps(self.choice)) if self.choice else None,
            None if self.grammar is None else Structured("grammar", _read(self.grammar)),
        ) if made is not None]
        if len(given) > 1:
            raise UsageError("an answer has one structure",
                             hint="Give one of --json-schema, --regex, --choice and --grammar.")
        return given[0] if given else None


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
