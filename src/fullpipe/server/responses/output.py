"""An answer is put together item by item, and each step of it is an event."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from fullpipe.server.protocol.answers import ChosenLogprob
from fullpipe.server.responses.answers import (
    ArgumentsDelta,
    ArgumentsDone,
    Event,
    Item,
    ItemEvent,
    OutputCall,
    OutputMessage,
    OutputReasoning,
    OutputText,
    PartEvent,
    ReasoningDelta,
    ReasoningDone,
    ReasoningPart,
    TextDelta,
    TextDone,
)
from fullpipe.server.responses.protocol import Status


class _Writer(Protocol):
    """Writes one item, whose place in the answer is `index`."""

    @property
    def item(self) -> Item: ...

    index: int

    def begin(self) -> Iterator[Event]:
        """What is told between the item's begin and its first piece."""
        ...

    def end(self) -> Iterator[Event]:
        """What is told between its last piece and its end. The item is whole then."""
        ...


class _Message:
    def __init__(self, id: str, index: int) -> None:
        self.item = OutputMessage(id=id, status="in_progress", content=[])
        self.index = index
        self._text: list[str] = []
        self._logprobs: list[ChosenLogprob] = []

    def begin(self) -> Iterator[Event]:
        yield PartEvent(type="response.content_part.added", output_index=self.index, item_id=self.item.id,
                        part=OutputText(text="", annotations=[], logprobs=[]))

    def add(self, text: str, logprobs: Sequence[ChosenLogprob]) -> Iterator[Event]:
        self._text.append(text)
        self._logprobs += logprobs
        yield TextDelta(output_index=self.index, item_id=self.item.id, delta=text, logprobs=list(logprobs))

    def end(self) -> Iterator[Event]:
        whole = OutputText(text="".join(self._text), annotations=[], logprobs=self._logprobs)
        self.item.content.append(whole)
        yield TextDone(output_index=self.index, item_id=self.item.id, text=whole.text, logprobs=whole.logprobs)
        yield PartEvent(type="response.content_part.done", output_index=self.index, item_id=self.item.id, part=whole)


class _Reasoning:
    def __init__(self, id: str, index: int) -> None:
        self.item = OutputReasoning(id=id, status="in_progress", summary=[], content=[])
        self.index = index
        self._text: list[str] = []

    def begin(self) -> Iterator[Event]:
        yield PartEvent(type="response.content_part.added", output_index=self.index, item_id=self.item.id,
                        part=ReasoningPart(text=""))

    def add(self, text: str) -> Iterator[Event]:
        self._text.append(text)
        yield ReasoningDelta(output_index=self.index, item_id=self.item.id, delta=text)

    def end(self) -> Iterator[Event]:
        whole = ReasoningPart(text="".join(self._text))
        self.item.content.append(whole)
        yield ReasoningDone(output_index=self.index, item_id=self.item.id, text=whole.text)
        yield PartEvent(type="response.content_part.done", output_index=self.index, item_id=self.item.id, part=whole)


class _Call:
    """number: of the chat's call."""

    def __init__(self, id: str, index: int, number: int, call_id: str, name: str) -> None:
        self.item = OutputCall(id=id, status="in_progress", call_id=call_id, name=name, arguments="")
        self.index, self.number = index, number
        self._arguments: list[str] = []

    def begin(self) -> Iterator[Event]:
        yield from ()

    def add(self, arguments: str) -> Iterator[Event]:
        self._arguments.append(arguments)
        yield ArgumentsDelta(output_index=self.index, item_id=self.item.id, delta=arguments)

    def end(self) -> Iterator[Event]:
        self.item.arguments = "".join(self._arguments)
        yield ArgumentsDone(output_index=self.index, item_id=self.item.id, name=self.item.name,
                            arguments=self.item.arguments)


class Output:
    """Takes in what the model says, in order, and tells of it. What is of another kind than what came before begins an
    item of its own. Of tokens that are no text of a message no log-probabilities are told.

    id: that the items' own are made of. items: all so far; the last may not be whole.
    """

    def __init__(self, id: str) -> None:
        self.items: list[Item] = []
        self._id = id
        self._writer: _Writer | None = None
        self._held: list[ChosenLogprob] = []  # of tokens whose text is not certain yet, or is none

    def think(self, text: str) -> Iterator[Event]:
        self._held.clear()
        writer = self._writer
        if not isinstance(writer, _Reasoning):
            writer = _Reasoning(self._name("rs"), len(self.items))
            yield from self._begin(writer)
        yield from writer.add(text)

    def say(self, text: str, logprobs: Sequence[ChosenLogprob] = ()) -> Iterator[Event]:
        """Without text nothing is told, and the log-probabilities wait for some."""
        self._held += logprobs
        if not text:
            return
        writer = self._writer
        if not isinstance(writer, _Message):
            writer = _Message(self._name("msg"), len(self.items))
            yield from self._begin(writer)
        held, self._held = self._held, []
        yield from writer.add(text, held)

    def call(self, number: int, call_id: str, name: str, arguments: str) -> Iterator[Event]:
        """A piece of a call; call_id and name are of its first."""
        self._held.clear()
        writer = self._writer
        if not isinstance(writer, _Call) or writer.number != number:
            writer = _Call(self._name("fc"), len(self.items), number, call_id, name)
            yield from self._begin(writer)
        if arguments:
            yield from writer.add(arguments)

    def finish(self, status: Status) -> Iterator[Event]:
        """The end. An answer without anything is an empty text."""
        if not self.items:
            yield from self._begin(_Message(self._name("msg"), 0))
        if self._held and isinstance(self._writer, _Message):
            held, self._held = self._held, []
            yield from self._writer.add("", held)
        yield from self._end(status)

    def _name(self, kind: str) -> str:
        return f"{kind}_{self._id}_{len(self.items)}"

    def _begin(self, writer: _Writer) -> Iterator[Event]:
        yield from self._end("completed")
        self._writer = writer
        self.items.append(writer.item)
        yield ItemEvent(type="response.output_item.added", output_index=writer.index,
                        item=writer.item.model_copy(deep=True))
        yield from writer.begin()

    def _end(self, status: Status) -> Iterator[Event]:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        yield from writer.end()
        writer.item.status = status
        yield ItemEvent(type="response.output_item.done", output_index=writer.index, item=writer.item)
