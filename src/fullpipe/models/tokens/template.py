"""A model's chat template, rendered as transformers renders it but without importing transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fullpipe.errors import UnsupportedModel, UsageError


class ChatTemplate:
    """Jinja source together with the tokens it may name.

    A template comes with a model, so it is code of strangers: it runs in jinja's sandbox.
    """

    def __init__(self, source: str, bos_token: str | None = None, eos_token: str | None = None) -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}

    def render(self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool = True) -> str:
        """The conversation as the model expects it, ending where its answer begins (generation_prompt) or after the
        last message.

        Raises `UsageError` when the template refuses the messages, `UnsupportedModel` when it is no template.
        """
        try:
            return self._compiled.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=generation_prompt, **self._tokens
            )
        except jinja2.TemplateError as error:
            raise UsageError(
                f"the model's chat template refuses these messages: {error}",
                hint="Templates want alternating user and assistant messages; some take no system message.",
            ) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise UnsupportedModel(
                f"the model's chat template cannot be read: {error}",
                hint="It continues plain text: a str in Python, /v1/completions on a server. On the command line that "
                     "is `chat_template=False`.",
            ) from error


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; for decoding it is what is in it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's declaration

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Unlike jinja's own filter it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
