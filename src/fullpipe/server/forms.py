"""What a request asks of the form of its answer is decided here, before it runs: which tools the model is told of, what
its text must be, and who reads the text.

A chat may offer tools. With `tool_choice` "auto" the model calls them in its own form (`tools/names.py`); a call that
is demanded ("required", or a named function) comes in a form that the text is made to have (`structure.py`). What a
model thinks first is told apart (`reasoning.py`), except in a text with a structure: it has that from its first token
on, so there are no thoughts in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fullpipe.errors import FullpipeError, MissingExtra, UsageError
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.options import ServerOptions
from fullpipe.server import reasoning
from fullpipe.server.problems import Problem, told
from fullpipe.server.protocol.answers import FinishReason
from fullpipe.server.protocol.forms import NamedTool, Tool
from fullpipe.server.protocol.requests import ChatRequest, Options
from fullpipe.server.reasoning import Thoughtful, ThoughtTokens
from fullpipe.server.structure import asked_structure, named_call, required_calls
from fullpipe.server.tools.events import Notes, Reader, Words, call_id
from fullpipe.server.tools.made import NamedCall, RequiredCalls
from fullpipe.server.tools.marks import Without
from fullpipe.server.tools.names import Style, style_of

_LAST = 16  # tokens of a prompt, in which it is seen whether the model is to think
_NOT_MADE = "the call is the model's own where it may choose; arguments keep to their schema in calls that are demanded"


@dataclass(slots=True)
class Form:
    """Says what the answer to one request is, and makes the readers of its choices.

    tools: as chat templates are told of them; None: of none. changes: fields of `SamplingParams` that differ for it.
    asker: the field that asks for a structure. called: the reason of an answer that ends by itself and calls tools.
    unheeded: fields without effect, and why. thinks: the answer begins with thoughts.
    """

    tools: list[dict[str, Any]] | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    asker: str = ""
    called: FinishReason = "tool_calls"
    unheeded: list[tuple[str, str]] = field(default_factory=list)
    thinks: bool = False
    reader: Callable[[], Reader] = Words
    thoughts: Callable[[], ThoughtTokens | None] = lambda: None
    begins: Callable[[Sequence[int]], bool] = lambda prompt: False

    def follow(self, prompt: Sequence[int]) -> None:
        """Take note of what the answer follows; before its readers are made."""
        self.thinks = self.begins(prompt)

    def problem_of(self, error: FullpipeError) -> Problem | None:
        """What the caller is told where the structure that he asks for cannot be made; None: it is not about that."""
        about = isinstance(error, MissingExtra) or (isinstance(error, UsageError) and error.param == "structured")
        if not about or "structured" not in self.changes:
            return None
        return Problem(400, f"{self.asker}: {told(error)}", param=self.asker)


class Forms:
    """Knows in which forms the served model writes.

    tokenizer: the model's, with its chat template. options: name the parsers.
    """

    def __init__(self, tokenizer: Tokenizer, options: ServerOptions) -> None:
        self._tokenizer, self._options = tokenizer, options

    def of_text(self, body: Options) -> Form:
        """Of a completion. Raises `Problem`, as `of_chat`."""
        asked = asked_structure(body)
        return Form() if asked is None else Form(changes={"structured": asked[1]}, asker=asked[0])

    def of_chat(self, body: ChatRequest) -> Form:
        form = self.of_text(body)
        choice = _choice(body)
        if choice == "none":
            return self._read(form, body, None, ())
        if form.changes:
            raise Problem(400, f"{form.asker}: an answer that may call tools can have no other form; set tool_choice "
                               "to \"none\", or leave the tools out", param=form.asker)
        form.tools = [tool.plain() for tool in body.tools or ()]
        if choice == "auto":
            return self._of_free_calls(form, body)
        return self._of_demanded_calls(form, body, choice)

    def _of_free_calls(self, form: Form, body: ChatRequest) -> Form:
        style, tools, template = self._style, body.tools or [], self._tokenizer.template
        if any(tool.function.strict for tool in tools):
            form.unheeded.append(("tools.function.strict", _NOT_MADE))
        names = frozenset(tool.function.name for tool in tools)
        if style is not None:
            new_id, parser = style.new_id, style.parser
            return self._read(form, body, lambda: parser(_notes(body, new_id), names), style.marks)
        if template is not None and "tools" in template.source:  # else it refuses them, and knows better why
            raise Problem(400, "tools: this server does not know the form in which its model writes calls, so the "
                               "choice cannot be the model's; demand a call, by tool_choice", param="tools",
                          code="unsupported_parameter")
        return form

    def _of_demanded_calls(self, form: Form, body: ChatRequest, choice: str | Tool) -> Form:
        new_id = self._style.new_id if self._style else call_id
        form.asker = "tools"
        if isinstance(choice, Tool):
            name = choice.function.name
            form.changes["structured"], form.called = named_call(choice), "stop"
            form.reader = lambda: NamedCall(_notes(body, new_id), name)
        else:
            form.changes["structured"] = required_calls(body.tools or (), body.parallel_tool_calls is not False)
            form.reader = lambda: RequiredCalls(_notes(body, new_id))
        return form

    def _read(self, form: Form, body: ChatRequest, parser: Callable[[], Reader] | None,
              marks: tuple[str, ...]) -> Form:
        """Have the form's text read: thoughts, if the model has any, then calls, if it may."""
        innermost, otherwise = parser or Words, reasoning.STYLES.get(self._options.reasoning_parser)
        if otherwise is not None and "structured" not in form.changes:
            marks = (*marks, *reasoning.MARKS)
            self._have_thoughts_read(form, innermost, otherwise, body.include_reasoning is not False)
        else:
            form.reader = innermost
        self._show(form, body, marks)
        return form

    def _have_thoughts_read(self, form: Form, then: Callable[[], Reader], otherwise: bool, tell: bool) -> None:
        backend = self._tokenizer.backend
        begin, end = (backend.token_to_id(mark) for mark in reasoning.MARKS)
        form.begins = lambda prompt: reasoning.thinks_after(
            self._tokenizer.decode(prompt[-_LAST:], skip_special_tokens=False), otherwise)
        form.reader = lambda: Thoughtful(form.thinks, then(), tell)
        form.thoughts = lambda: ThoughtTokens(begin, end, form.thinks)

    def _show(self, form: Form, body: ChatRequest, marks: tuple[str, ...]) -> None:
        """Have marks shown in the text that are special tokens; the others are left out of what is read, unless the
        request wants to see them."""
        if not marks or body.skip_special_tokens is False:
            return
        special, reader = self._tokenizer.special, form.reader
        if not any(mark in special for mark in marks):
            return
        hidden = [text for text in special if text not in marks]
        form.changes["skip_special_tokens"] = False
        form.reader = lambda: Without(hidden, reader())

    @cached_property
    def _style(self) -> Style | None:
        template = self._tokenizer.template
        return style_of(self._options.tool_call_parser, template.source if template else "")


def _notes(body: ChatRequest, new_id: Callable[[], str]) -> Notes:
    return Notes(new_id, 1 if body.parallel_tool_calls is False else None)


def _choice(body: ChatRequest) -> str | Tool:
    """Who decides about calls: "none" (there are none), "auto" (the model), "required" (the model, of one at least), or
    the tool that is to be called."""
    choice, tools = body.tool_choice, body.tools or []
    names = [tool.function.name for tool in tools]
    if (twice := next((index for index, name in enumerate(names) if name in names[:index]), None)) is not None:
        where = f"tools[{twice}].function.name"
        raise Problem(400, f"{where}: another tool has the name {names[twice]!r} too", param=where)
    if choice is None:
        return "auto" if tools else "none"
    if choice != "none" and not tools:
        raise Problem(400, "tool_choice: there are no tools to choose; give them in tools", param="tool_choice")
    if isinstance(choice, NamedTool):
        asked = choice.function.name
        if asked not in names:
            raise Problem(400, f"tool_choice.function.name: no tool has the name {asked[:60]!r}; there are "
                               f"{', '.join(names)[:300]}", param="tool_choice.function.name")
        return tools[names.index(asked)]
    return choice
