"""What the pipeline holds, live in the terminal: as a line, and as a picture. Drawn from the event stream."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fullpipe.messages import Died, Emitted, Event, Landed, Launched

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.text import Text

_LEVELS = " ▁▂▃▄▅▆▇█"


class PipelineLine:
    """Listens to an engine: live rows per flight in the pipeline, newest first, and how many tokens were in
    flight before they were needed."""

    def __init__(self, stages: int, width: int) -> None:
        self._stages, self._width = stages, width
        self._flights: dict[int, set[int]] = {}
        self._flight_of: dict[int, int] = {}
        self._hits = self._emitted = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Launched():
                self._flights[event.flight] = set(event.nodes)
                self._flight_of |= dict.fromkeys(event.nodes, event.flight)
            case Died():
                for node in event.nodes:
                    if (flight := self._flight_of.pop(node, None)) is not None:
                        self._flights[flight].discard(node)
            case Landed():
                for node in self._flights.pop(event.flight, ()):
                    self._flight_of.pop(node, None)
            case Emitted():
                self._emitted += 1
                self._hits += event.hit

    def line(self) -> str:
        """The line as it stands now."""
        rows = [len(nodes) for nodes in list(self._flights.values())[::-1]][: self._stages]
        rows += [0] * (self._stages - len(rows))
        bars = "".join(_LEVELS[min(8, -(-8 * count // self._width))] for count in rows)
        return (f"stages |{bars}| {sum(rows):>3} live rows in flight   {self._emitted} tokens, "
                f"{self._hits} already in flight when needed")


@dataclass(slots=True)
class _Node:
    token: int
    parent: int
    landed: bool = False


@dataclass(slots=True)
class _Flight:
    launched: float
    nodes: list[int]
    tokens: list[int]


_REDRAW_S = 0.1
_RECENT = 60  # tokens in the strip of hits and misses
_TEXT_LINES = 6
_SLOT = 11  # characters of a row's token
_LIVE, _DEAD, _HIT, _MISS = "bold blue", "bright_black", "green", "red"


class Watch:
    """Listens to an engine and draws one request: the text, the stages, the tree, and what was accepted.

    The stream says where a flight was only when it has landed. Until then its place is told from its age and from
    how long the last one took to land.
    """

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._flights: dict[int, _Flight] = {}
        self._nodes: dict[int, _Node] = {}  # launched and alive
        self._root: int | None = None
        self._root_token: int | None = None
        self._recent: deque[bool] = deque(maxlen=_RECENT)
        self._hits = self._misses = 0
        self._now = 0.0
        self._traversal: float | None = None
        self._live: Live | None = None
        self._drawn = 0.0
        self.text = ""
        self.name: Callable[[int], str] = lambda token: f"#{token}"

    # ---- listening -----------------------------------------------------------------------------------------

    def __call__(self, event: Event) -> None:
        self._now = event.time
        match event:
            case Launched():
                self._launch(event)
            case Landed():
                self._land(event)
            case Died():
                for id in event.nodes:
                    self._nodes.pop(id, None)
            case Emitted():
                self._emit(event)
        if self._live is not None and time.monotonic() - self._drawn > _REDRAW_S:
            self._drawn = time.monotonic()
            self._live.refresh()

    def _launch(self, event: Launched) -> None:
        self._flights[event.flight] = _Flight(event.time, event.nodes, event.tokens)
        for id, parent, token in zip(event.nodes, event.parents, event.tokens):
            self._nodes[id] = _Node(token, parent)
            if parent < 0:
                self._root, self._root_token = id, token

    def _land(self, event: Landed) -> None:
        if flight := self._flights.pop(event.flight, None):
            self._traversal = event.time - flight.launched
        for id in event.nodes:
            if node := self._nodes.get(id):
                node.landed = True

    def _emit(self, event: Emitted) -> None:
        self._nodes.pop(event.node, None)
        self._hits += event.hit
        self._misses += not event.hit
        self._recent.append(event.hit)
        self._root_token = event.token
        children = (id for id, node in self._nodes.items() if node.parent == event.node and node.token == event.token)
        self._root = next(children, None)

    # ---- drawing -------------------------------------------------------------------------------------------

    @contextmanager
    def live(self, console: Console) -> Iterator[None]:
        """Draw on this terminal until the block ends; then the drawing is gone."""
        from rich.live import Live

        # Refreshed by the events alone: a thread that draws would read what `__call__` is changing.
        with Live(self, console=console, auto_refresh=False, transient=True) as self._live:
            yield
        self._live = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height, width = options.size.height, options.max_width
        text = self._text_lines(width, min(_TEXT_LINES, height // 6))
        yield from text
        yield self._rule("stages: rows alive, dead", width)
        stages = self._stage_lines(width, height // 3)
        yield from stages
        yield self._rule("tree: text, landed, in flight", width)
        around = 5  # three rules, the acceptance, and the line that the cursor stands in
        yield from self._tree(max(height - len(text) - len(stages) - around, 1), width)
        yield self._rule("acceptance", width)
        yield self._acceptance(width)

    def _text_lines(self, width: int, room: int) -> list[Text]:
        """The end of the text."""
        from rich.text import Text

        lines = [line[i : i + width] for line in self.text.split("\n") for i in range(0, max(len(line), 1), width)]
        return [Text(line, no_wrap=True) for line in lines[-room:]]

    @staticmethod
    def _rule(title: str, width: int) -> Text:
        from rich.text import Text

        return Text(f"── {title} ".ljust(width, "─")[:width], style="dim", no_wrap=True)

    def _stage_lines(self, width: int, room: int) -> list[Text]:
        from rich.text import Text

        held = self._places()
        lines = []
        for stage in range(self._stages if self._stages <= room else max(room - 1, 1)):
            line = Text(f"{stage:>3} ", no_wrap=True, overflow="crop")
            for flight in held.get(stage, ()):
                for id, token in zip(flight.nodes, flight.tokens):
                    line.append(self._cell(token), style=_LIVE if id in self._nodes else _DEAD)
            line.truncate(width)
            lines.append(line)
        if self._stages > len(lines):
            lines.append(Text(f"    ... and {self._stages - len(lines)} more stages"[:width], style="dim"))
        return lines

    def _places(self) -> dict[int, list[_Flight]]:
        """Flights by the stage they are thought to be in; before anything has landed, one stage each."""
        held: dict[int, list[_Flight]] = {}
        for rank, flight in enumerate(reversed(self._flights.values())):
            age = (self._now - flight.launched) / self._traversal if self._traversal else rank / self._stages
            held.setdefault(min(int(self._stages * age), self._stages - 1), []).append(flight)
        return held

    def _cell(self, token: int) -> str:
        return _shorten(self.name(token), _SLOT - 1).ljust(_SLOT)

    def _tree(self, room: int, width: int) -> Iterator[Text]:
        """The root, and below it every launched node that is alive, indented by depth."""
        from rich.text import Text

        if self._root_token is None:
            return
        yield Text(_shorten(self.name(self._root_token), width), style=_HIT)
        lines = list(self._below()) if self._root is not None else []
        shown = lines if len(lines) < room else lines[: max(room - 2, 0)]  # the root, and a line on the rest
        for depth, node in shown:
            text = "  " * depth + _shorten(self.name(node.token), 30)
            yield Text(text[:width], style="yellow" if node.landed else "blue", no_wrap=True)
        if len(shown) < len(lines):
            yield Text(f"  ... and {len(lines) - len(shown)} more nodes"[:width], style="dim")

    def _below(self) -> Iterator[tuple[int, _Node]]:
        children: dict[int, list[int]] = {}
        for id, node in self._nodes.items():
            children.setdefault(node.parent, []).append(id)
        assert self._root is not None
        stack = [(1, id) for id in reversed(children.get(self._root, ()))]
        while stack:
            depth, id = stack.pop()
            yield depth, self._nodes[id]
            stack += [(depth + 1, child) for child in reversed(children.get(id, ()))]

    def _acceptance(self, width: int) -> Text:
        from rich.text import Text

        count = self._hits + self._misses
        rate = f"{self._hits / count:.0%}" if count else "-"
        line = Text(f"{count} tokens, {self._hits} hits, {self._misses} misses, hit rate {rate}  ", no_wrap=True)
        for hit in self._recent:
            line.append("●" if hit else "×", style=_HIT if hit else _MISS)
        line.truncate(width)
        return line


def _shorten(text: str, room: int) -> str:
    """On one line, with spaces and line ends to be seen."""
    text = text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return text if len(text) <= room else text[: max(room - 1, 0)] + "…"
