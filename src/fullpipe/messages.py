"""All that is handed from one part to another is here: flights, landings, drafts. No torch.

A flight is a handful of small integers. What a stage must know to compute a row is in the row itself,
or came earlier in the same first-in-first-out channel:

- `Part.commits` extends the request's committed path (in order of position). Committed tokens are
  ancestors of everything that follows.
- `Part.paths[i]` lists the slots of row i's *uncommitted* ancestors, its own slot last (empty when the
  row is itself committed: prompt tokens and the root).

So row i attends to `{committed slots at positions <= positions[i]} + paths[i]`. Compared with keeping a
mask row per possible parent at every stage this sends a few more integers, but a station holds no state
that must be freed when a node dies, and a batch of masks is two vectorised writes.
"""

from __future__ import annotations

from typing import Annotated, Any, NewType

from msgspec import Meta, Struct, field

from fullpipe.request import SamplingParams

ArenaId = NewType("ArenaId", int)
"""By this number the stations know one admission of a request, and its path in their caches. Each admission gets a new
one; numbers say nothing about order, and never come again within an engine."""

Token = Annotated[int, Meta(ge=0, lt=1 << 31)]
"""The id of a token. No vocabulary is as large."""

Logprob = Annotated[float, Meta(le=1.0)]
"""The natural logarithm of a probability. Rounding may lift it a little above 0; it is never NaN."""


class Opening(Struct, array_like=True):
    """Tells every station of a request that is to come. Filled by the engine.

    request: whose it is. drafts: the draft station is told of this arena too, and will be told of its end.
    prompt_len: positions below it are prompt (presence and frequency penalties do not count them).
    path: slots of tokens that stand at this station already, by position from 0 on: another request computed them, and
        they are committed here from the start.
    ends: the model's end tokens, where what may follow depends on which they are.
    scored: (stages) the prompt's tokens, where the request asks how likely they are (`SamplingParams.prompt_logprobs`).
    """

    arena: ArenaId
    prompt_len: int
    params: SamplingParams
    path: list[int] = field(default_factory=list)
    request: int = -1
    drafts: bool = True
    ends: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)


class Part(Struct, array_like=True):
    """The rows of one request in a flight, parents before children. All lists but `commits` run in parallel.

    commits: slots that joined the committed path since the last flight of this channel.
    nodes: node ids (-1: a prompt token, which nobody asks about later).
    wants: True where an answer is wanted: the token that follows (stages), guesses of it (draft). To the draft
    a row may come again, wanted again, behind the new ones: its parents have been there before it in any case.
    ahead: (draft jobs) slots that the draft may fill on its own, with its likeliest guess behind the first wanted row,
    the likeliest one behind that, and so on: see `Flight.least`.
    """

    arena: ArenaId
    commits: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    wants: list[bool] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.nodes)

    def keep(self, rows: list[int]) -> Part:
        """The same part with only these rows; `commits` stay, for they must arrive whatever dies."""
        columns = (self.nodes, self.tokens, self.positions, self.slots, self.paths, self.wants)
        return Part(self.arena, self.commits, *([column[i] for i in rows] for column in columns), self.ahead)  # type: ignore


class Flight(Struct, array_like=True):
    """Rows that enter a station together and travel as one; also the form of a draft job.

    id: unique within its channel (stages and draft count separately) and rising.
    opens, closes: arenas that begin before and end after this flight.
    fanout: (draft jobs) children wanted per row at most. least: (draft jobs) log-probability of a chain, given the row
    that it follows, below which the draft does not go on with it (`Part.ahead`).
    """

    id: int
    parts: list[Part] = field(default_factory=list)
    opens: list[Opening] = field(default_factory=list)
    closes: list[ArenaId] = field(default_factory=list)
    fanout: int = 0
    least: float = 0.0

    @property
    def num_rows(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def nodes(self) -> list[int]:
        """Of all rows, in order; -1 for prompt tokens."""
        return [node for part in self.parts for node in part.nodes]


class Tap(Struct):
    """Hidden states that a stage has made of a flight, on their way to the draft station.

    flight: the rows that were really computed.
    layers: how many layers of the model were finished for each column of `features`, rising.
    features: [rows, len(layers), hidden], a torch tensor, or a NumPy array from scripted stages.
    """

    flight: Flight
    layers: list[int]
    features: Any


class Leg(Struct):
    """A flight's stay at one station. Times in seconds of the pipeline's clock."""

    station: str
    start: float
    end: float
    nodes: list[int]  # rows really computed, after early cancellation


class Expansion(Struct):
    """Guesses of what follows one node.

    logprobs: natural logarithm of the probability that the target picks this token, given the parent.
    parents: -1 where the guess follows the node itself, else the index of the guess that it follows
    (drafts that see several tokens ahead, such as n-gram, answer with whole chains).
    computed: indices of the guesses that the draft has computed already, each following the one before: the i-th stands
    in the i-th slot of `Part.ahead`.
    sources: where several drafts speak as one, who named each guess: a sum of 2**k, k counting the drafts from 0.
    Empty: there is one draft. Guesses of different sources are believed differently (`sequences.calibration`).
    learned: the draft has learned from what became of its guesses how likely they are, and is taken at its word.
    """

    node: int
    tokens: list[Token]
    logprobs: list[Logprob]
    parents: list[int]
    computed: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    learned: bool = False


class Scored(Struct, array_like=True):
    """Says how likely the token of a prompt at a position was, given those before it.

    rank: 1 where none was likelier. told: (token, log-probability) of it and behind it of the likeliest ones.
    """

    arena: ArenaId
    position: int
    rank: int
    told: list[tuple[Token, Logprob]]


def steps(answer: Any) -> int:
    """How many steps a draft went on by itself, each of one row; of a stage's answer none."""
    return sum(len(one.computed) for one in answer) if isinstance(answer, list) else 0


class Event(Struct, tag_field="type", tag=True, forbid_unknown_fields=True):
    """Something that happened at `time` (seconds of the pipeline's clock)."""

    time: float


class Ready(Event):
    """Stage 0 can take another flight: it is free, or about to be and nothing waits there."""


class Landed(Event):
    """The last stage's answer to a flight: for each live row that wanted it, the token that follows.

    The stage makes it, with time 0 and no legs; the pipeline fills in both. nodes, tokens and what else is not empty
    are parallel.

    margins: how far the picked token's (noisy) logit stands above the second best, None where it has no rival; empty
    unless the pipeline was built to report it. others: the other tokens that the row's request lets pass, best first
    (`SamplingParams.accept_typical`); empty when every request of the flight is exact. logprobs: for each row whose
    request asks for them (`SamplingParams.logprobs`), (token, log-probability) of the picked token and behind it of the
    likeliest ones; an empty list for the other rows; empty when no request of the flight asks. prompts: of prompt rows
    (parallel to nothing), where a request asks what follows them. stuck: those of the nodes after which the structure
    that the text is held to cannot be followed, each with why; what is said of them in the lists means nothing.
    """

    flight: int
    nodes: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    margins: list[float | None] = field(default_factory=list)
    others: list[list[Token]] = field(default_factory=list)
    logprobs: list[list[tuple[Token, Logprob]]] = field(default_factory=list)
    legs: list[Leg] = field(default_factory=list)
    prompts: list[Scored] = field(default_factory=list)
    stuck: list[tuple[int, str]] = field(default_factory=list)


class Drafted(Event):
    """The draft station's answer to a job. What it leaves unanswered it may answer in the reply to a later one."""

    job: int
    expansions: list[Expansion]
    leg: Leg


class Failed(Event):
    """A station is gone. The engine raises `StationFailed`; nothing more comes from this pipeline.

    hint: what the user may do about it, if the station knows.
    """

    station: str
    reason: str
    hint: str | None = None


class Woken(Event):
    """A moment that was asked for has come (`InProcessPipeline.wake`). Nothing to an engine."""
