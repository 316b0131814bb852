"""Dataclasses of options become a command line: a verb names the dataclasses, and gets them filled.

    def show(model: ModelOptions, pipeline: Annotated[PipelineOptions, Only("stages")]) -> None: ...

Every field that was made with a help text (`fullpipe.options.option`) becomes an option of the verb. Its default is the
field's, or that of the parameter's default where it has one.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Collection
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from enum import StrEnum
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from fullpipe.cli.lists import integers
from fullpipe.errors import PromptError, UsageError
from fullpipe.methods import METHODS
from fullpipe.options import (
    DTYPES,
    KV_CACHE_DTYPES,
    LOG_LEVELS,
    QUANTIZATIONS,
    REASONING_PARSERS,
    TOOL_CALL_PARSERS,
    ChatOptions,
    ModelOptions,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead of the text.")]
_OBJECT = """Write '{"enable_thinking": false}', in single quotes for the shell."""


def one_of(*names: str) -> type[StrEnum]:
    """A type of option that takes these alone."""
    return StrEnum("one_of", {name: name for name in names})  # type: ignore[return-value]


_CHOICES = {"method": one_of("auto", *METHODS), "dtype": one_of(*DTYPES), "quantization": one_of(*QUANTIZATIONS),
            "kv_cache_dtype": one_of(*KV_CACHE_DTYPES), "log_level": one_of(*LOG_LEVELS),
            "tool_call_parser": one_of(*TOOL_CALL_PARSERS), "reasoning_parser": one_of(*REASONING_PARSERS)}


class Only:
    """Marks a parameter of which a verb takes these options alone."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def takes(self, name: str) -> bool:
        return name in self.names


class Without(Only):
    """Marks a parameter of which a verb takes all options but these."""

    def takes(self, name: str) -> bool:
        return name not in self.names


class Said:
    """Marks a parameter that takes the options of a dataclass, as a dictionary of those that were given.

    elsewhere: of these the default is found later; in what words.
    """

    def __init__(self, kind: type, words: str, elsewhere: Collection[str]) -> None:
        self.kind, self.words, self.elsewhere = kind, words, elsewhere


@dataclass(frozen=True, slots=True)
class _Group:
    """Is a parameter of a verb that is a dataclass of options, or what was said of one. said: how; None: not so."""

    name: str
    default: Any
    fields: tuple[Field[Any], ...]
    types: dict[str, Any]
    said: Said | None = None

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> _Group | None:
        """None for a parameter of another kind."""
        kind: Any
        kind, *marks = get_args(parameter.annotation) if get_origin(parameter.annotation) is Annotated \
            else (parameter.annotation,)
        said = next((mark for mark in marks if isinstance(mark, Said)), None)
        kind = said.kind if said else kind
        if not is_dataclass(kind):
            return None
        only = next((mark for mark in marks if isinstance(mark, Only)), Without())
        default = parameter.default if parameter.default is not parameter.empty else kind()  # type: ignore[operator]
        own = tuple(one for one in fields(kind) if one.metadata.get("help") and only.takes(one.name))
        return cls(parameter.name, default, own, get_type_hints(kind), said)

    def parameters(self) -> list[inspect.Parameter]:
        return [self._parameter(one) for one in self.fields]

    def _parameter(self, one: Field[Any]) -> inspect.Parameter:
        kind, default = self.types[one.name], getattr(self.default, one.name)
        if self.said is None:
            return _parameter(one, kind, default)
        words = "" if isinstance(default, bool) or default == () else str(default)
        if one.name in self.said.elsewhere:
            words = f"{self.said.words}, or {words}"
        return _parameter(one, kind | None, None, words)

    def collect(self, given: dict[str, Any]) -> Any:
        """The dataclass, with what was given taken out of `given`."""
        if self.said is not None:
            taken = {one.name: (self.types[one.name], one, given.pop(one.name)) for one in self.fields}
            return {name: _read(one, kind, value) for name, (kind, one, value) in taken.items() if value is not None}
        values = {one.name: _read(one, self.types[one.name], given.pop(one.name)) for one in self.fields}
        return replace(self.default, **values)


def spread(function: Callable[..., None]) -> Callable[..., None]:
    """The verb with every parameter that is a dataclass of options replaced by those options, in its signature too."""
    own = inspect.signature(function, eval_str=True)
    groups = {name: group for name, parameter in own.parameters.items() if (group := _Group.of(parameter))}

    def verb(**given: Any) -> None:
        made = {name: group.collect(given) for name, group in groups.items()}
        function(**given, **made)

    parameters = []
    for name, parameter in own.parameters.items():
        parameters += groups[name].parameters() if name in groups else [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    verb.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    verb.__name__, verb.__doc__ = function.__name__, function.__doc__
    return verb


def _parameter(one: Field[Any], kind: Any, default: Any, shown: str | None = None) -> inspect.Parameter:
    """One option, as typer reads it off a signature. shown: what its help says of its default."""
    flag = _flag(one)
    flags = [*one.metadata.get("flags", ()), *([] if one.metadata.get("flags") else [flag])]
    more: dict[str, Any] = {"help": one.metadata["help"], "metavar": one.metadata.get("metavar"),
                            "show_default": default not in (None, (), "") if shown is None else shown or False}
    if one.name in _CHOICES:
        choice = _CHOICES[one.name]
        kind, default = (choice | None, None) if default is None else (choice, choice(default))
    parts = get_args(kind) or (kind,)
    if bool in parts and not one.metadata.get("flags"):
        flags = [f"{flag}/--no-{flag.removeprefix('--')}"]
    if _is_list(kind, str):
        kind, default = list[str] | None, list(default or ()) or None
    elif _is_list(kind, int):
        kind, default = str | None, ",".join(map(str, default)) if default else None
        more["metavar"] = "N,N,..."
    elif _is_object(kind):
        kind, default = str | None, json.dumps(default) if default else None
        more["metavar"] = "JSON"
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default,
                             annotation=Annotated[kind, typer.Option(*flags, **more)])


def _flag(one: Field[Any]) -> str:
    flags: tuple[str, ...] = one.metadata.get("flags") or ("--" + one.name.replace("_", "-"),)
    return flags[0]


def _is_list(kind: Any, item: type) -> bool:
    """Whether a field holds several of `item`; it may be None as well."""
    return any(get_origin(part) is tuple and get_args(part)[0] is item for part in (kind, *get_args(kind)))


def _is_object(kind: Any) -> bool:
    """Whether a field holds names with values; it may be None as well."""
    return any(get_origin(part) is dict for part in (kind, *get_args(kind)))


def _object(text: str, flag: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{flag}: {text[:60]!r} is not JSON ({error})", hint=_OBJECT) from None
    if not isinstance(value, dict):
        raise UsageError(f"{flag}: {text[:60]!r} is not a JSON object", hint=_OBJECT)
    return value


def _read(one: Field[Any], kind: Any, value: Any) -> Any:
    if one.name in _CHOICES:
        return None if value is None else str(value)
    if _is_list(kind, str):
        return tuple(value or ())
    if _is_list(kind, int) and value is not None:
        return tuple(integers(value, _flag(one), least=one.metadata.get("least", 1)))
    if _is_object(kind) and value is not None:
        return _object(value, _flag(one))
    return value


def read_prompt(prompt: str) -> str:
    """The prompt, or standard input for "-". Raises PromptError when there is nothing in it."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise PromptError("the prompt is empty", hint='Write fullpipe generate "PROMPT", or - to read standard input.')
    return text


def as_prompt(text: str, chat: ChatOptions, model: ModelOptions) -> str | list[dict[str, str]]:
    """Plain text, or messages for the model's chat template. Raises UsageError for what only a template gives effect
    to, where none is used."""
    if not chat.use_chat_template:
        given = {"--system": chat.system, "--chat-template": model.chat_template,
                 "--default-chat-template-kwargs": model.default_chat_template_kwargs}
        if (flag := next((flag for flag, value in given.items() if value is not None), None)) is not None:
            raise UsageError(f"{flag} has no effect without a chat template",
                             hint=f"Drop {flag}, or --no-chat-template.")
        return text
    messages = [{"role": "user", "content": text}]
    return messages if chat.system is None else [{"role": "system", "content": chat.system}, *messages]
