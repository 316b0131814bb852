"""One choice of a chat is heard: its text goes through the reader of its form, and what it says becomes OpenAI's
messages and deltas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fullpipe.server.answer import News
from fullpipe.server.forms import Form
from fullpipe.server.protocol.answers import (
    AnswerCall,
    AnswerMessage,
    CallDelta,
    CalledFunction,
    Delta,
    FinishReason,
    FunctionDelta,
)
from fullpipe.server.tools.events import Argued, Called, Event, Said, Thought, joined


class Voice:
    """Hears one choice, whose news must all come here, in order."""

    def __init__(self, form: Form) -> None:
        self._called = form.called
        self._reader, self._thoughts = form.reader(), form.thoughts()
        self._words: list[str] = []
        self._thought: list[str] = []
        self._calls: list[AnswerCall] = []

    def hear(self, news: News) -> list[Event]:
        """What the choice says by these news; all there is if they are its last."""
        ended = news.choice.reason is not None
        if self._thoughts:
            news.choice.reasoning_tokens += self._thoughts.count(news.token_ids, ended=ended)
        events = self._reader.push(news.text)
        if ended:
            events += self._reader.finish()
        events = joined(events)
        self._keep(events)
        return events

    def ending(self, reason: FinishReason) -> FinishReason:
        """The reason that is told of an answer that ended for this one."""
        return self._called if self._calls and reason == "stop" else reason

    def message(self) -> AnswerMessage:
        thought, words = "".join(self._thought) or None, "".join(self._words)
        silent = not words and bool(thought or self._calls)
        return AnswerMessage(content=None if silent else words, reasoning=thought, reasoning_content=thought,
                             tool_calls=self._calls or None)

    def _keep(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Said(text):
                    self._words.append(text)
                case Thought(text):
                    self._thought.append(text)
                case Called(_, id, name):
                    self._calls.append(AnswerCall(id=id, function=CalledFunction(name=name, arguments="")))
                case Argued(index, text):
                    self._calls[index].function.arguments += text


def deltas(events: Sequence[Event]) -> Iterator[Delta]:
    """What a stream tells of events, one after another; what is not set is not in it."""
    for event in events:
        match event:
            case Said(text):
                yield Delta(content=text)
            case Thought(text):
                yield Delta(reasoning=text, reasoning_content=text)
            case Called(index, id, name):
                yield Delta(tool_calls=[CallDelta(index=index, id=id, type="function",
                                                  function=FunctionDelta(name=name, arguments=""))])
            case Argued(index, text):
                yield Delta(tool_calls=[CallDelta(index=index, function=FunctionDelta(arguments=text))])
