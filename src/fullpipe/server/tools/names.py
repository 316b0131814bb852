"""The forms in which models write calls go by the names that vLLM gives their parsers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from fullpipe.server.tools import hermes, llama3, mistral
from fullpipe.server.tools.events import Notes, Reader, call_id, short_call_id


@dataclass(frozen=True, slots=True)
class Style:
    """A family of models writes calls so.

    parser: reads an answer, given the names of the tools that are offered. marks: what it must see of the text, special
    tokens too. new_id: makes names of calls that the family's templates take.
    """

    parser: Callable[[Notes, Collection[str]], Reader]
    marks: tuple[str, ...]
    new_id: Callable[[], str] = call_id


STYLES = {
    "hermes": Style(hermes.HermesParser, hermes.MARKS),
    "llama3_json": Style(llama3.Llama3Parser, llama3.MARKS),
    "mistral": Style(mistral.MistralParser, mistral.MARKS, short_call_id),
}

# What in a chat template tells how its model writes calls. The first that fits counts; None: in a form unknown here.
_TELLS: tuple[tuple[str, str | None], ...] = (
    (r"<function=|<arg_key>|<invoke ", None),
    (re.escape(hermes.BEGIN), "hermes"),
    (re.escape(mistral.BEGIN), "mistral"),
    (re.escape(llama3.TAG) + r'|"name": function name, "parameters"', "llama3_json"),
)


def style_of(parser: str, template: str) -> Style | None:
    """How a model writes calls; None where that is not known.

    parser: a name, "none", or "auto": by its chat template's text.
    """
    if parser == "auto":
        parser = next((name or "none" for tell, name in _TELLS if re.search(tell, template)), "none")
    return STYLES.get(parser)
