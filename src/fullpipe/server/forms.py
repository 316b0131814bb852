"""What a request asks of the form of its answer is decided here, before it runs: which tools the model is told of, what
its text must be, and who reads the text.

A chat may offer tools. With `tool_choice` "auto" the model calls them in its own form (`tools/names.py`); a call that
is demanded ("required", or a named function) comes in a form that the text is made to have (`structure.py`). What a
model thinks first is told apart (`reasoning.py`), and has no form.
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
from fullpipe.server.grammars import behind_thoughts, free_calls
from fullpipe.server.problems import Problem, told
from fullpipe.server.protocol.answers import FinishReason
from fullpipe.server.protocol.forms import NamedTool, Tool
from fullpipe.server.protocol.requests import ChatRequest, Options
from fullpipe.server.reasoning import Thinking, Thoughtful, ThoughtTokens
from fullpipe.server.structure import arguments_of, asked_structure, calls_schema, named_call, required_calls
from fullpipe.server.tools import hermes
from fullpipe.server.tools.events import Notes, Reader, Words, call_id
from fullpipe.server.tools.made import NamedCall, RequiredCalls
from fullpipe.server.tools.marks import Without
from fullpipe.server.tools.names import STYLES, Style, style_of

_UNKNOWN = ("tools: this server does not know the form in which its model writes calls, so the choice cannot be the "
            "model's; demand a call, by tool_choice")
_ONE_FORM = ("an answer that may call tools can have no other form; set tool_choice to \"none\", or leave the tools "
             "out")
_NOT_STRICT = "the model calls in a form of its own, which is held to no schema; it is where a call is demanded"


@dataclass(slots=True)
class Form:
    """Says what the answer to one request is, and makes the readers of its choices.

    tools: as chat templates are told of them; None: of none. changes: fields of `SamplingParams` that differ for it.
    asker: the field that asks for a structure. free: it leaves words free. called: the reason of an answer that ends by
    itself and calls tools. unheeded: fields without effect, and why. parser: reads what is no thought. hidden: special
    tokens to leave out. thinking: how the model's thoughts are known; None: they are not told apart. thinks: the answer
    begins with some.
    """

    tools: list[dict[str, Any]] | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    asker: str = ""
    free: bool = False
    called: FinishReason = "tool_calls"
    unheeded: list[tuple[str, str]] = field(default_factory=list)
    parser: Callable[[], Reader] = Words
    hidden: Sequence[str] = ()
    thinking: Thinking | None = None
    thinks: bool = False

    def follow(self, prompt: Sequence[int]) -> None:
        """Take note of what the answer follows, before it is asked for: thoughts may have begun there."""
        if self.thinking is None:
            return
        opened = self.thinking.opened(prompt)
        self.thinks = self.thinking.always if opened is None else opened
        structured = self.changes.get("structured")
        if structured is None or self.free or opened is False:
            return
        behind = behind_thoughts(structured, self.thinking.special, optional=not self.thinks)
        if behind is None:
            self.thinking = None
        else:
            self.changes["structured"] = behind

    def reader(self) -> Reader:
        """For one choice, from its beginning."""
        reader = self.parser()
        if self.thinking:
            reader = Thoughtful(self.thinks, reader, self.thinking.told)
        return Without(self.hidden, reader) if self.hidden else reader

    def thoughts(self) -> ThoughtTokens | None:
        """Counts the tokens of one choice that are thoughts; None: there are none."""
        return ThoughtTokens(self.thinking.shown, self.thinks) if self.thinking else None

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
        try:
            asked = asked_structure(body)
        except UsageError as error:  # a schema that was given as text may spell what is no text
            field = next((name for name, value in _structures(body).items() if value is not None), "response_format")
            raise Problem(400, f"{field}: {told(error)}", param=field) from error
        return Form() if asked is None else Form(changes={"structured": asked[1]}, asker=asked[0])

    def of_chat(self, body: ChatRequest) -> Form:
        form, choice = self.of_text(body), _choice(body)
        marks: tuple[str, ...] = ()
        if choice != "none":
            if form.changes:
                raise Problem(400, f"{form.asker}: {_ONE_FORM}", param=form.asker)
            form.tools = [tool.plain() for tool in body.tools or ()]
            if choice == "auto":
                marks = self._have_calls_read(form, body)
            else:
                self._demand_calls(form, body, choice)
        if self._options.reasoning_parser in reasoning.STYLES:
            form.thinking = self._thinking(body)
            marks = (*marks, *reasoning.MARKS)
        self._show(form, body, marks)
        return form

    def _have_calls_read(self, form: Form, body: ChatRequest) -> tuple[str, ...]:
        """The model may call as it likes. Returns what must be seen of its text."""
        style, tools, template = self._style, body.tools or [], self._tokenizer.template
        if style is None:
            if template is not None and "tools" in template.source:  # else it refuses them, and knows better why
                raise Problem(400, _UNKNOWN, param="tools", code="unsupported_parameter")
            return ()
        parser, new_id, names = style.parser, style.new_id, frozenset(tool.function.name for tool in tools)
        form.parser = lambda: parser(_notes(body, new_id), names)
        if any(tool.function.strict for tool in tools):
            if style is STYLES["hermes"]:
                strict = {tool.function.name: arguments_of(tool) for tool in tools if tool.function.strict}
                form.changes["structured"] = free_calls(
                    calls_schema(tools, "arguments", strict=True), strict, *hermes.MARKS, self._tokenizer.special,
                    one=body.parallel_tool_calls is False)
                form.asker, form.free = "tools", True
            else:
                form.unheeded.append(("tools.function.strict", _NOT_STRICT))
        return style.marks

    def _demand_calls(self, form: Form, body: ChatRequest, choice: str | Tool) -> None:
        new_id = self._style.new_id if self._style else call_id
        form.asker = "tools"
        if isinstance(choice, Tool):
            name = choice.function.name
            form.changes["structured"], form.called = named_call(choice), "stop"
            form.parser = lambda: NamedCall(_notes(body, new_id), name)
        else:
            form.changes["structured"] = required_calls(body.tools or (), body.parallel_tool_calls is not False)
            form.parser = lambda: RequiredCalls(_notes(body, new_id))

    def _thinking(self, body: ChatRequest) -> Thinking:
        return Thinking(self._tokenizer, reasoning.STYLES[self._options.reasoning_parser],
                        told=body.include_reasoning is not False)

    def _show(self, form: Form, body: ChatRequest, marks: tuple[str, ...]) -> None:
        """Have marks shown in the text that are special tokens; the others are left out of what is read, unless the
        request wants to see them."""
        if not marks or body.skip_special_tokens is False:
            return
        special = self._tokenizer.special
        if any(mark in special for mark in marks):
            form.changes["skip_special_tokens"] = False
            form.hidden = [text for text in special if text not in marks]

    @cached_property
    def _style(self) -> Style | None:
        template = self._tokenizer.template
        return style_of(self._options.tool_call_parser, template.source if template else "")


def _structures(body: Options) -> dict[str, Any]:
    """What asks for a structure in a text or in texts, by the field's name."""
    asks = body.structured_outputs
    inner = {} if asks is None else {"json": asks.json_, "regex": asks.regex, "choice": asks.choice,
                                     "grammar": asks.grammar}
    return {"guided_json": body.guided_json, "guided_regex": body.guided_regex, "guided_choice": body.guided_choice,
            "guided_grammar": body.guided_grammar,
            **{f"structured_outputs.{name}": value for name, value in inner.items()}}


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
    if choice == "auto" and body.tools == []:
        return "none"
    if choice != "none" and not tools:
        raise Problem(400, "tool_choice: there are no tools to choose; give them in tools", param="tool_choice")
    if isinstance(choice, NamedTool):
        asked = choice.function.name
        if asked not in names:
            raise Problem(400, f"tool_choice.function.name: no tool has the name {asked[:60]!r}; there are "
                               f"{', '.join(names)[:300]}", param="tool_choice.function.name")
        return tools[names.index(asked)]
    return choice
