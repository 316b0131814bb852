"""An engine that also collects what it tells, for tests that drive one step by step."""

from __future__ import annotations

from collections.abc import Iterable

from fullpipe.engine import Engine, Listener, RequestStats
from fullpipe.events import Emitted, Finished
from fullpipe.messages import Event
from fullpipe.methods import Load, Method
from fullpipe.options import EngineOptions
from fullpipe.pipeline.base import Pipeline
from fullpipe.request import Request
from fullpipe.sequences.sequence import Sequence
from fullpipe.sequences.tree import Node, State, TokenTree


class TellingEngine(Engine):
    """figures: of every request that was ever submitted. `step` returns the tokens and ends that it told."""

    def __init__(self, pipeline: Pipeline, method: Method, *, listeners: Iterable[Listener] = (),
                 **options: object) -> None:
        self.figures: dict[int, RequestStats] = {}
        self._news: list[Emitted | Finished] = []
        super().__init__(pipeline, method, options=EngineOptions(**options),  # type: ignore[arg-type]
                         listeners=[self._collect, *listeners])

    def _collect(self, event: Event) -> None:
        if isinstance(event, (Emitted, Finished)):
            self._news.append(event)

    def submit(self, request: Request, *, arrived: float | None = None) -> Sequence:
        sequence = super().submit(request, arrived=arrived)
        self.figures[request.id] = self.stats.of(request.id)
        return sequence

    def step(self, wait: float | None = None) -> list[Emitted | Finished]:  # type: ignore[override]
        super().step(wait)
        news, self._news = self._news, []
        return news


class Alone:
    """What a method sees of a sequence, around a tree that a test has drawn."""

    def __init__(self, tree: TokenTree, room: int = 99) -> None:
        self.tree, self.room, self.waiting_since = tree, room, 0.0
        self.request = Request(0, (1,), None)  # type: ignore[arg-type]
        if tree.root.state is not State.PROPOSED:
            tree.root.slot = 0  # what has entered has a slot


def launched(method: Method, tree: TokenTree, room: int = 99) -> list[Node]:
    """What the method launches of one tree."""
    return [node for _, nodes in method.launch([Alone(tree, room)], Load(1)) for node in nodes]  # type: ignore


def expanded(method: Method, tree: TokenTree, room: int = 99) -> list[Node]:
    """What the method has the draft look at in one tree."""
    return [node for _, nodes in method.expand([Alone(tree, room)], Load(1)) for node in nodes]  # type: ignore
