"""The engine adds these events to those of the pipeline (`messages`), and tells its listeners all. No torch."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import field

from fullpipe.messages import Drafted, Event, Failed, Landed, Ready, Scored, Woken

Fate = Literal["hit", "miss", "last"]
"""What became of speculation on an emitted token: it was in flight (hit), it was not (miss), or it ended the text, so
that nothing was to follow it and it counts as neither (last)."""


class Submitted(Event):
    """A request was taken in. arrived: when it came, which may be earlier; seconds of the pipeline's clock."""

    request: int
    prompt_tokens: int
    arrived: float


class Admitted(Event):
    """A request got memory on the stations and runs, for the first time or again. cached_tokens: of its prompt, taken
    over from another request instead of being computed."""

    request: int
    cached_tokens: int = 0


class Preempted(Event):
    """A request gave its memory back and waits again."""

    request: int


class Attached(Event):
    """The engine goes on with another pipeline: every request waits again, and ids of nodes and flights go on."""


class Launched(Event):
    """A flight set off with these nodes. requests: whose each of them is. prompt_rows: rows of committed tokens that it
    carries besides, by request."""

    flight: int
    nodes: list[int]
    parents: list[int]
    tokens: list[int]
    positions: list[int]
    requests: list[int] = field(default_factory=list)
    prompt_rows: dict[int, int] = field(default_factory=dict)


class Asked(Event):
    """A job set off for the draft. rows: by request."""

    job: int
    rows: dict[int, int]


class PromptScored(Event):
    """It is known how likely each token of a prompt but the first was (`SamplingParams.prompt_logprobs`). It comes
    before the request's first token; scores: by position, from 1 on."""

    request: int
    scores: list[Scored]


class Emitted(Event):
    """A token became part of the text. node: whose landing said so. altered: the target would have said another one
    there (lossy requests only). margin, logprobs: as in `Landed`."""

    request: int
    node: int
    token: int
    position: int
    fate: Fate
    margin: float | None = None
    altered: bool = False
    logprobs: list[tuple[int, float]] = field(default_factory=list)

    @property
    def hit(self) -> bool:
        return self.fate == "hit"


class Died(Event):
    """These nodes will never be committed; those in flight are cancelled."""

    request: int
    nodes: list[int]


class Finished(Event):
    """A request is over: "stop", "length", "abort", "deadline" or "error". detail: "why", of an error of its own."""

    request: int
    reason: str
    detail: dict[str, Any] = field(default_factory=dict)


AnyEvent = (Ready | Landed | Drafted | Failed | Woken | Submitted | Admitted | Preempted | Attached | Launched | Asked
            | PromptScored | Emitted | Died | Finished)
"""Every kind, as a decoder wants to know them: `msgspec.json.decode(line, type=AnyEvent)`."""
