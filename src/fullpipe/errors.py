"""Every error that Fullpipe raises on purpose.

    FullpipeError
    ├── UsageError (also ValueError)      something asked for cannot be done as asked
    │   ├── PromptError                   empty, or longer than the context
    │   ├── StructureError                a text that cannot be held to its structure to the end
    │   ├── MessageError                  a message that no chat template could say
    │   └── DraftMismatch                 the draft does not fit the target
    ├── ModelError                        a model that cannot be used
    │   ├── ModelNotFound
    │   ├── UnsupportedModel              architecture, tensor type or option we do not implement
    │   └── DamagedModel                  missing, truncated or altered weights
    ├── CacheError                        the cache folder: not writable, disk full
    ├── FetchError                        a download that failed
    ├── MissingExtra                      an optional part that is not installed
    ├── PipelineError
    │   ├── StationFailed                 a stage or draft process died or hangs
    │   └── HostsDiffer                   hosts that cannot run one pipeline together
    └── Unavailable                       a service that takes nothing now
        └── Overloaded                    because its queue is full

A message says what happened; `hint` says what to do about it. Programming mistakes of our own are
assertions, not errors.

What somebody may type stands in backticks: a command, or an option by its name in Python, alone or with a value
(`max_model_len`, `stages=2`). Each front door spells options as they are given there (`spelled`), and a server keeps
from its callers what they cannot give (`without`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_TYPED = re.compile(r"`([^`]+)`")
_OPTION = re.compile(r"`([a-z][a-z_]*)(?:=([^`]*))?`")
_SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z`])")


def spelled(text: str, spell: Callable[[str, str | None], str | None]) -> str:
    """The text with its options as a front door has them. spell: an option's name and its value, if one is said;
    returns None for what is no option there."""
    return _OPTION.sub(lambda found: spell(found[1], found[2]) or found[0], text)


def without(text: str, known: Callable[[str], bool]) -> str:
    """The sentences of the text in which nothing is to be typed, or only what is `known`, told without backticks."""
    sentences = _SENTENCE_END.split(text)
    kept = [one for one in sentences if all(known(typed.partition("=")[0]) for typed in _TYPED.findall(one))]
    return " ".join(kept).replace("`", "")


class FullpipeError(Exception):
    """Base of all errors a user may meet. `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(FullpipeError, ValueError):
    """`param`: the name of the option at fault, where it is one."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.param = param


class PromptError(UsageError):
    pass


class StructureError(UsageError):
    """The structure of a text cannot be followed to its end."""


class MessageError(UsageError):
    """A conversation, or what is asked of its template, cannot be. `where`: as in "messages[0].content"."""

    def __init__(self, where: str, what: str, *, hint: str | None = None) -> None:
        super().__init__(f"{where}: {what}", hint=hint)
        self.where = where


class DraftMismatch(UsageError):
    pass


class ModelError(FullpipeError):
    exit_code = 3


class ModelNotFound(ModelError):
    pass


class UnsupportedModel(ModelError):
    pass


class DamagedModel(ModelError):
    pass


class CacheError(FullpipeError):
    exit_code = 4


class FetchError(FullpipeError):
    exit_code = 5


class MissingExtra(FullpipeError):
    exit_code = 6


class PipelineError(FullpipeError):
    exit_code = 7


class StationFailed(PipelineError):
    """A stage or draft process died, hangs, or reported an error.

    `station` is its name ("stage 3", "draft"); text emitted so far is still with the caller.
    """

    def __init__(self, station: str, reason: str, *, hint: str | None = None) -> None:
        super().__init__(f"{station} failed: {reason}", hint=hint)
        self.station = station
        self.reason = reason


class HostsDiffer(PipelineError):
    """Hosts cannot run one pipeline together, and nothing was started.

    `problems`: all of them, each a host, what is wrong with it, and the way out.
    """

    def __init__(self, problems: Sequence[tuple[str, str, str]]) -> None:
        hosts = list(dict.fromkeys(host for host, _, _ in problems))
        super().__init__(f"{', '.join(hosts)} cannot take part, and nothing was started",
                         hint="\n".join(f"{host}: {what}. {way_out}".rstrip() for host, what, way_out in problems))
        self.problems = list(problems)


class Unavailable(FullpipeError):
    """A service takes no requests now. `retry_after_s`: seconds after which it may."""

    exit_code = 8

    def __init__(self, message: str, *, retry_after_s: float, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    """Its queue is full."""


_MADE_OF_MORE = (MessageError, StationFailed, HostsDiffer, Unavailable)


def by_name(kind: str, message: str, hint: str | None) -> FullpipeError | None:
    """The error of ours that another process told by the name of its type; None: that is none of ours. One that is made
    of more than a message becomes what it also is: HostsDiffer a PipelineError."""
    named = globals().get(kind)
    if not (isinstance(named, type) and issubclass(named, FullpipeError)):
        return None
    plain = next(one for one in named.__mro__ if not issubclass(one, _MADE_OF_MORE))
    assert issubclass(plain, FullpipeError)
    return plain(message, hint=hint)
