"""A model's chat template, rendered as transformers renders it but without importing transformers."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fullpipe.errors import MessageError, UnsupportedModel, UsageError
from fullpipe.models.tokens.messages import CutOff, conversation, text_of

_OWN_FILE = "Give it another one: `chat_template=FILE`."
_MARK = "THE-FINAL-MESSAGE-ENDS-HERE "  # its space is how one sees whether the template strips messages

# What is asked for by other means, so that a template's variables must not say otherwise.
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"})


class ChatTemplate:
    """Jinja source together with the tokens it may name.

    A template comes with a model, so it is code of strangers: it runs in jinja's sandbox, and whatever it raises is an
    error of the conversation that it was given.

    tokens: special tokens by the name that tokenizer_config.json gives them ("bos_token"). variables: what else it is
    told, unless `render` says otherwise.
    """

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None,
                 variables: Mapping[str, Any] | None = None) -> None:
        self.source = source
        self.tokens = {"bos_token": "", "eos_token": "", **(tokens or {})}
        self.variables = dict(variables or {})
        check_variables(self.variables)

    def render(self, messages: Sequence[Any], generation_prompt: bool | None = None, *, continue_final: bool = False,
               variables: Mapping[str, Any] | None = None, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The conversation as the model expects it.

        generation_prompt: it ends where an answer begins, else after the last message; None: unless that goes on.
        continue_final: it ends within the last message, which the model goes on with. variables: what else the template
        is told, such as `enable_thinking`; what it does not read has no effect (`reads`). tools: what the model may
        call, each as in OpenAI's `tools`.

        Raises `UsageError` when the template refuses the messages, `UnsupportedModel` when it is no template.
        """
        if continue_final and generation_prompt:
            raise MessageError("continue_final_message", "excludes add_generation_prompt",
                               hint="A final message is continued, or a new one begun: leave one of them out.")
        check_variables(variables or {})
        if tools and not self.reads("tools"):
            raise MessageError("tools", "the model's chat template has no words for them",
                               hint=f"Leave them out. {_OWN_FILE}")
        begins = not continue_final if generation_prompt is None else generation_prompt
        told = {"documents": None, **self.tokens, **self.variables, **(variables or {}),
                "tools": list(tools) if tools else None, "add_generation_prompt": begins}
        turns = self._as_it_takes_them(conversation(messages))
        return self._continued(turns, told) if continue_final else self._said(turns, told)

    def reads(self, name: str) -> bool:
        """Whether a variable of this name can have an effect."""
        return name in self._reads

    def check(self) -> None:
        """Raise `UnsupportedModel` when it is no template."""
        self._compiled  # noqa: B018 - compiles it

    # ---- what it takes -----------------------------------------------------------------------------------

    def _as_it_takes_them(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The turns with contents as this template reads them, and roles that it knows."""
        for index, turn in enumerate(turns):
            if not self._takes_parts:
                turn["content"] = text_of(turn)
            elif isinstance(turn["content"], str) and not self._takes_text:
                turn["content"] = [{"type": "text", "text": turn["content"]}] if turn["content"] else []
            if turn["role"] == "developer" and "developer" not in self.source:
                turn["role"] = "system"
            if "tool_calls" in turn and "tool_calls" not in self.source:
                raise MessageError(f"messages[{index}].tool_calls", "the model's chat template has no words for them",
                                   hint=f"Leave out the turns with tools. {_OWN_FILE}")
        return turns

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether it goes through the parts of a message, as templates of models that see do."""
        return any(_is_content(one.iter, self._contents) for one in self._tree.find_all(nodes.For))

    @cached_property
    def _takes_text(self) -> bool:
        """Whether it asks if a content is a text, before it goes through parts."""
        return any(one.name == "string" and _is_content(one.node, self._contents)
                   for one in self._tree.find_all(nodes.Test))

    @cached_property
    def _contents(self) -> frozenset[str]:
        """Variables that hold a message's content: what templates call so, and what is set to one."""
        usual = frozenset({"content"})
        return usual.union(one.target.name for one in self._tree.find_all(nodes.Assign)
                           if isinstance(one.target, nodes.Name) and _is_content(one.node, usual))

    @cached_property
    def _reads(self) -> frozenset[str]:
        return frozenset(meta.find_undeclared_variables(self._tree))

    # ---- rendering ---------------------------------------------------------------------------------------

    def _said(self, turns: list[dict[str, Any]], told: Mapping[str, Any]) -> str:
        """A call that was cut off is told as it stands. Where the template goes through its arguments, and fails on a
        text, they are an empty object: a server must be able to read its own answers."""
        calls = [call["function"] for turn in turns for call in turn.get("tool_calls", ())]
        given = [call["arguments"] for call in calls]
        try:
            return self._with_arguments(turns, told)
        except UsageError:
            if not any(isinstance(one, CutOff) for one in given):
                raise
        for call, arguments in zip(calls, given):
            call["arguments"] = {} if isinstance(arguments, CutOff) else arguments
        return self._with_arguments(turns, told)

    def _with_arguments(self, turns: list[dict[str, Any]], told: Mapping[str, Any]) -> str:
        """Arguments of tool calls are objects, as transformers wants them, unless the template takes them for text."""
        calls = [call["function"] for turn in turns for call in turn.get("tool_calls", ())]
        try:
            text = self._rendered(turns, told)
            if not any(_spelled_by_python(call["arguments"], text) for call in calls):
                return text
        except UsageError as error:
            if not calls or not isinstance(error.__cause__, TypeError):
                raise
        for call in calls:
            call["arguments"] = _to_json(call["arguments"])
        return self._rendered(turns, told)

    def _rendered(self, turns: list[dict[str, Any]], told: Mapping[str, Any]) -> str:
        compiled = self._compiled
        try:
            return compiled.render({"messages": turns, **told})  # as a dictionary, so that one may be called `self`
        except Exception as error:  # strangers' code raises what it likes
            if type(error) is jinja2.TemplateError:  # its own words, of raise_exception
                raise UsageError(f"the model's chat template refuses these messages: {error}",
                                 hint=f"Send them as it wants them. {_OWN_FILE}") from error
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise UsageError(
                f"the model's chat template fails on these messages: {kind}{error}",
                hint=f"It may not be made for their roles ({', '.join(dict.fromkeys(turn['role'] for turn in turns))}) "
                     f"or for a field of theirs. {_OWN_FILE}") from error

    def _continued(self, turns: list[dict[str, Any]], told: Mapping[str, Any]) -> str:
        """Up to where the last message's content ends, which a mark finds."""
        if not turns or not turns[-1]["content"]:
            raise MessageError("continue_final_message", "the final message has no text to continue")
        content = turns[-1]["content"]
        *before, part = [{"text": content}] if isinstance(content, str) else content
        marked = {**part, "text": part["text"] + _MARK}
        last = {**turns[-1], "content": marked["text"] if isinstance(content, str) else [*before, marked]}
        text = self._said([*turns[:-1], last], told)
        end = text.rfind(_MARK.rstrip())
        if end < 0 or part["text"].strip() not in text[:end]:
            raise MessageError("continue_final_message", "the model's chat template does not write the final message "
                               "as it stands, so it cannot be continued", hint=_OWN_FILE)
        whole = text[:end] if text.startswith(_MARK, end) else text[:end].rstrip()
        return whole.replace(_MARK, "").replace(_MARK.rstrip(), "")  # where the template writes the message twice

    # ---- the template itself -----------------------------------------------------------------------------

    @cached_property
    def _environment(self) -> jinja2.Environment:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment

    @cached_property
    def _tree(self) -> nodes.Template:
        self.check()
        return self._environment.parse(self.source)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return self._environment.from_string(self.source)
        except Exception as error:  # Python's own SyntaxError and RecursionError, too
            raise UnsupportedModel(f"the model's chat template cannot be read: {error}", hint=_OWN_FILE) from error


def template_source(given: str) -> str:
    """A template's text, of a file or as it is given: whole, or in one line in which line ends are written as \\n.

    Raises `UsageError` when it is neither.
    """
    if "\n" in given:
        return given
    try:
        if "{{" in given or "{%" in given:
            return codecs.decode(given.encode("ascii", "backslashreplace"), "unicode_escape")
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"the chat template {given[:200]!r} cannot be read: {error}",
                         hint="Name a file with a jinja template, or give the template itself.") from error


def check_variables(variables: Mapping[str, Any]) -> None:
    """Raise `MessageError` for one that would contradict what a template is told anyway."""
    if (name := next((name for name in variables if name in RESERVED), None)) is not None:
        raise MessageError("chat_template_kwargs", f"cannot set {name!r}",
                           hint="They are for what a template reads besides, such as enable_thinking.")


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; for decoding it is what is in it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body, lineno=line)]


def _is_content(node: nodes.Node, names: frozenset[str]) -> bool:
    """Whether it is a message's content, or a variable of one of these names."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return (isinstance(node, nodes.Getattr) and node.attr == "content") \
        or (isinstance(node, nodes.Name) and node.name in names)


def _spelled_by_python(arguments: Any, text: str) -> bool:
    """Whether an object was written out as Python writes it, which no model has learnt."""
    spelled = str(arguments)
    return isinstance(arguments, (dict, list)) and bool(arguments) and spelled in text \
        and spelled != json.dumps(arguments, ensure_ascii=False)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Unlike jinja's own filter it escapes nothing for HTML. What is no JSON any more stays as it is."""
    if isinstance(value, CutOff):
        return str(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
