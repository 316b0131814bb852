"""The one loop: events in, flights out.

Knows requests, trees, slots, a policy and a batching. Knows no torch, no processes and no kind of clock: whether the
pipeline is this process, eight machines or a simulation cannot be told from here. Read `Engine.step`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import count

from fullpipe.batching.base import Batching, Separate
from fullpipe.errors import PipelineError, PromptError, StationFailed, UsageError
from fullpipe.messages import (
    ArenaId,
    Died,
    Drafted,
    Emitted,
    Event,
    Failed,
    Fate,
    Finished,
    Flight,
    Landed,
    Launched,
    Leg,
    Opening,
    Part,
    Ready,
)
from fullpipe.methods.base import Policy
from fullpipe.pipeline.base import Pipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.sequences.blocks import Kept, Ledger, shared
from fullpipe.sequences.sequence import Channel, Track
from fullpipe.sequences.stats import RequestStats
from fullpipe.sequences.tree import Node

log = logging.getLogger(__name__)

_AFTER_FAILURE = "What was emitted is kept. Start again; if the station was only slow, allow it a longer time-out."

Judge = Callable[[int], str | None]
"""Looks at each emitted token and returns a finish reason to end the request there, or None."""

Listener = Callable[[Event], None]

_GROWTH = 256  # slots by which an arena grows
_MOST_PRIORITY = 10  # better and worse count alike, or ageing would not be for anybody's lifetime
_WORTH_WAITING = 64  # tokens of a prompt that another one is about to have computed
_AGEING_S = 30.0  # a request that has waited so long goes as if its priority were one better

_Parts = dict[int, tuple[Part, Track]]  # by request


class Engine:
    """Drives requests through a pipeline under a policy.

    batching: how requests share flights; None: each as if it were alone.
    chunk: prompt tokens per flight. fanout: children the draft may propose per node.
    spare: slots per request beyond prompt and answer, for speculation.
    max_num_seqs: requests that run at a time; the others wait in here. None: all.
    kv_slots: cache slots of all requests together, on each station. Then a request's arena begins small and grows; one
        that does not fit waits; and where there is nothing left to grow into, the youngest goes back to waiting, to be
        computed again from what it has emitted. The oldest always gets on, so every request does. None: no bound.
    share_prefixes: keep the arenas of finished requests while there is room, and let requests that begin alike take
        rows over. Needs kv_slots, and a draft that reads no taps: features of rows that are not computed never come.
    listeners: called with every event, the engine's own included; one that raises is dropped and logged.
    """

    def __init__(self, pipeline: Pipeline, policy: Policy, *, batching: Batching | None = None, chunk: int = 256,
                 fanout: int = 16, spare: int | None = None, max_num_seqs: int | None = None,
                 kv_slots: int | None = None, share_prefixes: bool = False,
                 listeners: Iterable[Listener] = ()) -> None:
        if share_prefixes and kv_slots is None:
            raise UsageError("prefixes can be shared only within a bound of cache memory",
                             hint="Say how many slots there are (kv_slots).")
        self.pipeline = pipeline
        self.policy = self._checked(policy)
        self.batching = batching or Separate()
        self.ledger = Ledger(kv_slots)
        self.num_preemptions = 0
        self._max_num_seqs, self._share_prefixes = max_num_seqs, share_prefixes
        self._chunk = chunk
        self._fanout = fanout
        self._spare = spare
        self._listeners = list(listeners)
        self._tracks: dict[int, Track] = {}  # those that run
        self._waiting: dict[int, Track] = {}
        self._node_ids, self._flight_ids, self._job_ids = count(), count(), count()
        self._arenas = map(ArenaId, count(1 << 40))  # of requests that begin anew, far from the ids of requests
        self._launched: dict[int, tuple[Track, Node]] = {}  # by node id, until they land or die
        self._asked: dict[int, tuple[Track, Node]] = {}  # by node id, until the draft answers
        self._flights: dict[int, list[tuple[Track, Node | None]]] = {}  # rows of what is under way
        self._logprobs: dict[int, list[tuple[int, float]]] = {}  # by node that has landed, until its turn or its death
        self._closes: dict[str, list[ArenaId]] = {"stages": [], "draft": []}
        self._stage_ready = False
        self._draft_ready = True
        self._broken = False  # for good, once a step ended in the middle
        self._now = pipeline.now()
        self._news: list[Emitted | Finished] = []

    # ---- the front ---------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._tracks or self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._tracks)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request: Request, judge: Judge | None = None, stats: RequestStats | None = None) -> Track:
        """Take a request in; it waits until it can run. The track's `stats` grow while it runs and stay valid after its
        end; they may be given, of a request that came earlier than now. Raises PromptError for one that would need more
        than all of the cache memory."""
        self._check_whole()
        assert request.id not in self._tracks and request.id not in self._waiting, "request ids must be unique"
        stats = stats or RequestStats(started=self.pipeline.now())
        track = Track.begin(request, self._whole(request), self._node_ids, stats)
        track.judge = judge
        self._wait(track)
        return track

    def adopt(self, track: Track) -> None:
        """Take over a request from an engine that is no more, and go on from its committed tokens."""
        self._check_whole()
        assert track.finished is None
        track.rewind(self._whole(track.request), self._node_ids)
        track.arena = next(self._arenas)
        self._wait(track)

    def abort(self, request: int) -> None:
        """End a request now; what it had in flight is cancelled. Unknown or finished ids are ignored."""
        if track := self._tracks.get(request) or self._waiting.get(request):
            self._finish(track, "abort")

    def unfinished(self) -> list[Track]:
        """All requests, in the order in which they came; valid after a failure too."""
        return sorted([*self._tracks.values(), *self._waiting.values()], key=_age)

    def _whole(self, request: Request) -> int:
        """Slots that a request will need in the end."""
        return len(request.prompt) + request.params.max_tokens + self._for_guesses()

    def _for_guesses(self) -> int:
        ample = 64 + 4 * self.pipeline.num_stages * self.policy.width
        return max(ample if self._spare is None else self._spare, self.policy.least_slots)

    @property
    def longest(self) -> int | None:
        """Tokens of prompt and answer together that fit into all of the cache memory; None: no bound."""
        return None if self.ledger.total is None else max(self.ledger.total - self._for_guesses(), 0)

    def check_fits(self, request: Request) -> None:
        """Raise PromptError for a request that would need more than all of the cache memory. From any thread."""
        whole = self._whole(request)
        if not self.ledger.fits(whole):
            raise PromptError(f"prompt, answer and guesses need {whole} cache slots, and there are {self.ledger.total}",
                              hint="Shorten the prompt, ask for fewer tokens, or give the server more cache memory.")

    def _wait(self, track: Track) -> None:
        self.check_fits(track.request)
        self._waiting[track.request.id] = track
        self._admit()

    def listen(self, listeners: Iterable[Listener]) -> None:
        """Call these too with every event, from now on."""
        self._listeners.extend(listeners)

    def probe(self, rows: int, draft: bool = True) -> tuple[list[Leg], Leg | None]:
        """Send so many rows of no meaning through the empty stations, and (draft) through the draft: how long each
        takes."""
        self.drain()
        part = Part(next(self._arenas), commits=list(range(rows)), nodes=[next(self._node_ids) for _ in range(rows)],
                    tokens=[0] * rows, positions=list(range(rows)), slots=list(range(rows)),
                    paths=[[] for _ in range(rows)], wants=[True] * rows)
        legs: list[Leg] = []
        drafted: list[Leg] = []

        def listen(event: Event) -> None:
            if isinstance(event, Landed):
                legs.extend(event.legs)
            elif isinstance(event, Drafted):
                drafted.append(event.leg)

        while not self._stage_ready:
            self.step()
        self._listeners.append(listen)
        opening = Opening(part.arena, rows, rows, SamplingParams())
        flight = Flight(next(self._flight_ids), [part], [opening], [part.arena])
        self._flights[flight.id], self._stage_ready = [], False
        self.pipeline.launch(flight)
        if draft and self.policy.needs_draft:
            self._draft_ready = False
            self.pipeline.draft(Flight(next(self._job_ids), [part.keep(list(range(rows)))], [opening], [part.arena],
                                       fanout=self._fanout))
        self.drain()
        self._listeners.remove(listen)
        return legs, drafted[0] if drafted else None

    def use(self, policy: Policy) -> None:
        """Change the policy while no request runs; what is left in the pipeline is waited for."""
        self.drain()
        self.policy = self._checked(policy)

    def drain(self) -> None:
        """Wait until the stations are empty and have closed the arenas of finished requests."""
        self._check_whole()
        if self.busy:
            raise UsageError("another request is running", hint="Wait for it, or close its stream first.")
        self.ledger.clear()
        self._close_dropped()
        while self._flights or self._closes["stages"] or self._closes["draft"] or not self._draft_ready:
            self.step()

    def _checked(self, policy: Policy) -> Policy:
        if policy.needs_draft and not self.pipeline.has_draft:
            raise UsageError(f"the method {policy.name} needs a draft",
                             hint="Name one (a model, or ngram), or use the method pp.")
        return policy

    def _check_whole(self) -> None:
        if self._broken:
            raise PipelineError("the pipeline stopped in the middle of a step and cannot go on",
                                hint="Make a new one (a new LLM).")

    # ---- admission and memory ----------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let those in that have waited longest, in order: one that does not fit holds up those behind it, or it might
        wait for ever."""
        while self._waiting and (self._max_num_seqs is None or len(self._tracks) < self._max_num_seqs):
            track = min(self._waiting.values(), key=self._rank)
            whole = self._whole(track.request)
            capacity = whole if self.ledger.total is None else min(whole, whole - track.left + _GROWTH)
            if not self.ledger.has(capacity):
                return
            source = self._source(track) if self._share_prefixes else None
            if self._share_prefixes and self._soon_shared(track, source):
                return
            self.ledger.take(capacity)
            del self._waiting[track.request.id]
            track.rewind(capacity, self._node_ids)
            if source is not None:
                self._share(track, source)
            self._tracks[track.request.id] = track
            if track.stats.admitted is None:
                track.stats.admitted = self.pipeline.now()
            self._close_dropped()

    def _rank(self, track: Track) -> tuple[float, float, int]:
        waited = max(self._now - track.stats.started, 0.0)
        priority = min(max(track.request.priority, -_MOST_PRIORITY), _MOST_PRIORITY)
        return (priority - waited // _AGEING_S, *_age(track))

    def _source(self, track: Track) -> Kept | None:
        """The arena, of a request that runs or has ended, that shares the longest beginning with this one's tokens."""
        found = [_kept(one) for one in self._tracks.values() if one.stages.opened]
        if kept := self.ledger.best(track.tokens):
            found.append(kept)
        return max(found, key=lambda kept: shared(kept.tokens, track.tokens, kept.stages), default=None)

    def _soon_shared(self, track: Track, source: Kept | None) -> bool:
        """Whether a prompt that is on its way to the stations begins so much alike that it is worth waiting for: all
        that come with one long prompt would else compute it, each for itself."""
        now = shared(source.tokens, track.tokens, source.stages) if source else 0
        return any(shared(one.tokens, track.tokens, len(one.tokens)) >= now + _WORTH_WAITING
                   for one in self._tracks.values() if one.stages.rows < one.num_prompt - 1)

    def _share(self, track: Track, source: Kept) -> None:
        length = shared(source.tokens, track.tokens, source.stages)
        track.take_over(track.stages, source.arena, source.slots[:length])
        drafted = shared(source.tokens, track.tokens, source.draft)
        track.take_over(track.draft, source.arena, source.slots[:drafted])
        track.cached = min(length, track.num_prompt)

    def _has_room(self, track: Track) -> bool:
        """Let an arena grow before it is full. False: the request had to go back to waiting itself."""
        whole, least = self._whole(track.request), self.policy.least_slots
        while track.slots.capacity < whole and track.slots.num_free < _GROWTH // 2:
            more = min(_GROWTH, whole - track.slots.capacity)
            if self.ledger.take(more):
                track.slots.grow(track.slots.capacity + more)
                self._close_dropped()
            elif track.slots.num_free >= least:
                return True
            else:
                youngest = max(self._tracks.values(), key=_age)
                self._preempt(youngest)
                if youngest is track:
                    return False
        return True

    def _preempt(self, track: Track) -> None:
        """Give all of a request's memory back; it waits, and is computed again from its committed tokens."""
        self.num_preemptions += 1
        self._leave(track, keep=False)
        track.rewind(self._whole(track.request), self._node_ids)
        track.arena = next(self._arenas)
        self._waiting[track.request.id] = track

    def _leave(self, track: Track, *, keep: bool) -> None:
        """A running request leaves the stations. keep: its arena may be of use to others."""
        del self._tracks[track.request.id]
        kept = _kept(track)
        dead = track.tree.clear()
        track.release([node for node in dead if node is not track.tree.root])
        self._bury(track, dead)
        if keep and self._share_prefixes and track.stages.opened:
            self.ledger.keep(kept)
        else:
            self.ledger.give(track.slots.capacity)
            self._close(kept)

    def _close_dropped(self) -> None:
        for kept in self.ledger.dropped():
            self._close(kept)

    def _close(self, kept: Kept) -> None:
        for channel, opened in (("stages", kept.in_stages), ("draft", kept.in_draft)):
            if opened:
                self._closes[channel].append(kept.arena)

    # ---- the loop ----------------------------------------------------------------------------------------

    def step(self, wait: float | None = None) -> list[Emitted | Finished]:
        """Send what can be sent, wait for the next events, act on them. Returns what users want to know.

        wait: seconds to wait at most (None: until something happens); so an engine that has nothing to do notices
        that a station is gone.

        Raises StationFailed when a stage or the draft is gone; what was emitted before stands in the tracks.
        After an exception of any kind, Ctrl-C included, nobody knows what the stations hold: the engine
        takes nothing more.
        """
        try:
            return self._step(wait)
        except BaseException:
            self._broken = True
            raise

    def _step(self, wait: float | None) -> list[Emitted | Finished]:
        self._send()
        for event in self.pipeline.events() if wait is None else self.pipeline.events(wait):
            self._now = event.time
            self._tell(event)
            match event:
                case Ready():
                    self._stage_ready = True
                case Landed():
                    self._on_landed(event)
                case Drafted():
                    self._on_drafted(event)
                case Failed():
                    raise StationFailed(event.station, event.reason, hint=event.hint or _AFTER_FAILURE)
        self._end_overdue()
        self._send()
        news, self._news = self._news, []
        return news

    def _end_overdue(self) -> None:
        now = self.pipeline.now()
        for track in self.unfinished():
            if track.request.deadline <= now:
                self._finish(track, "deadline")

    # ---- out: flights and draft jobs ---------------------------------------------------------------------

    def _send(self) -> None:
        self._admit()
        if self._stage_ready and (flight := self._next_flight()):
            self._stage_ready = False
            self.pipeline.launch(flight)
        if self._draft_ready and self.pipeline.has_draft and (job := self._next_job()):
            self._draft_ready = False
            self.pipeline.draft(job)

    def _next_flight(self) -> Flight | None:
        for track in list(self._tracks.values()):
            if track.request.id in self._tracks:  # making room for one may have sent another away
                self._has_room(track)
        tracks = list(self._tracks.values())
        flight = Flight(-1, opens=self._openings("stages"), closes=self._closings("stages"))
        rows: list[tuple[Track, Node | None]] = []
        parts = self._prompt_parts(tracks, rows)
        deciding = [track for track in tracks if track.stages.rows >= track.tree.root.position]
        for track, nodes in self.batching.launch(self.policy, deciding, len(rows), len(tracks), len(self._flights)):
            part, _ = parts.setdefault(track.request.id, (Part(track.arena), track))
            self._launch(track, nodes, part)
            rows += [(track, node) for node in nodes]
        flight.parts = self._sealed(parts, "stages")
        if not (flight.parts or flight.opens or flight.closes):
            return None
        flight.id = next(self._flight_ids)
        self._flights[flight.id] = rows
        if self._listeners:
            self._tell_launched(flight, rows)
        return flight

    def _prompt_parts(self, tracks: list[Track], rows: list[tuple[Track, Node | None]]) -> _Parts:
        """Committed tokens that the stages lack: of prompts the next chunk, those first that came first."""
        behind = [track for track in tracks if track.stages.rows < track.tree.root.position]
        left = self.batching.prompt_rows(self._chunk, len(tracks) - len(behind)) if behind else None
        parts: _Parts = {}
        for track in behind:
            limit = self._chunk if left is None else min(self._chunk, left)
            if limit > 0:
                part = track.committed_rows(track.stages, limit)
                parts[track.request.id] = part, track
                rows += [(track, None)] * len(part)
                left = None if left is None else left - len(part)
        return parts

    def _launch(self, track: Track, nodes: list[Node], part: Part) -> None:
        track.tree.new_flight()
        track.stats.on_launch(self._now, len(nodes))
        for node in nodes:
            track.tree.launch(node)
            track.add_node(part, track.stages, node, wants=True)
            self._launched[node.id] = (track, node)

    @staticmethod
    def _sealed(parts: _Parts, channel: str) -> list[Part]:
        """The parts that have rows, in the order in which their requests came."""
        for part, track in parts.values():
            if len(part):
                track.seal(part, track.stages if channel == "stages" else track.draft)
        return [part for part, _ in parts.values() if len(part)]

    def _next_job(self) -> Flight | None:
        job = Flight(-1, opens=self._openings("draft"), closes=self._closings("draft"), fanout=self._fanout)
        if self.policy.needs_draft:
            job.parts = self._job_parts()
        if not (job.parts or job.opens or job.closes):
            return None
        job.id = next(self._job_ids)
        return job

    def _job_parts(self) -> list[Part]:
        """What the draft has not seen of the committed paths, and behind it the nodes to propose children for."""
        parts = self._behind_in_draft()
        tracks = [track for track in self._tracks.values() if track.draft.rows >= track.tree.root.position]
        for track, nodes in self.batching.expand(self.policy, tracks):
            part, _ = parts.setdefault(track.request.id, (Part(track.arena), track))
            self._ask(track, nodes, part)
        for part, track in parts.values():
            track.stats.draft_calls += bool(len(part))
            track.stats.draft_rows += len(part)
        return self._sealed(parts, "draft")

    def _behind_in_draft(self) -> _Parts:
        """Committed tokens that the draft lacks, a chunk in all. Who lacks least comes first: a request that has just
        missed does not wait for another's prompt."""
        left, parts = self._chunk, _Parts()
        for track in sorted(self._tracks.values(), key=lambda track: track.tree.root.position - track.draft.rows):
            if left > 0 and track.draft.rows < track.tree.root.position:
                part = track.committed_rows(track.draft, left)
                parts[track.request.id] = part, track
                left -= len(part)
        return parts

    def _ask(self, track: Track, nodes: list[Node], part: Part) -> None:
        """Have the draft propose children for the nodes, each after those of its ancestors that the draft has not
        computed. One that is asked about again is sent again."""
        wanted = {node.id for node in nodes}
        sent: set[int] = set()
        for node in nodes:
            missing = [] if node.id in sent else _not_in_draft(node)
            if sum(other.slot is None for other in missing) > track.room:
                track.tree.return_unasked(node)
                continue
            for other in missing:
                track.add_node(part, track.draft, other, wants=other.id in wanted)
                other.in_draft = True
                sent.add(other.id)
                if other.id in wanted:
                    track.tree.ask(other)
                    self._asked[other.id] = (track, other)

    def _openings(self, channel: str) -> list[Opening]:
        """Of arenas that are missing on a channel, or too small there."""
        openings = []
        for track in self._tracks.values() if channel == "stages" or self.policy.needs_draft else ():
            state: Channel = track.stages if channel == "stages" else track.draft
            if state.capacity < track.slots.capacity:
                openings.append(track.opening(state))
        return openings

    def _closings(self, channel: str) -> list[ArenaId]:
        closes, self._closes[channel] = self._closes[channel], []
        return closes

    # ---- in: landings and drafts -------------------------------------------------------------------------

    def _on_landed(self, event: Landed) -> None:
        self._count(self._flights.pop(event.flight), event)
        touched: dict[int, Track] = {}
        margins = dict(zip(event.nodes, event.margins))
        others: Sequence[Sequence[int]] = event.others or [()] * len(event.nodes)
        if event.logprobs:
            self._logprobs.update((node, said) for node, said in zip(event.nodes, event.logprobs)
                                  if said and node in self._launched)
        for node_id, token, passing in zip(event.nodes, event.tokens, others):
            if entry := self._launched.pop(node_id, None):
                track, node = entry
                track.tree.land(node, token, passing)
                touched[track.request.id] = track
        for track in touched.values():
            self._commit(track, margins)

    def _commit(self, track: Track, margins: dict[int, float]) -> None:
        """Apply the commit rule for as long as the root has landed."""
        while track.finished is None:
            root = track.tree.root
            step = track.advance()
            if step is None:
                return
            self._asked.pop(root.id, None)  # what follows it is known
            self._bury(track, step.dead)
            reason = self._verdict(track, step.token)
            fate: Fate = "last" if reason is not None else "hit" if step.hit else "miss"
            track.stats.on_emit(self._now, step.hit, last=reason is not None, altered=step.altered)
            news = Emitted(self._now, track.request.id, root.id, step.token, root.position + 1, fate,
                           margins.get(root.id), step.altered, self._logprobs.pop(root.id, []))
            self._news.append(news)
            self._tell(news)
            if reason is not None:
                self._finish(track, reason)

    def _verdict(self, track: Track, token: int) -> str | None:
        request = track.request
        if token in request.eos or token in request.params.stop_token_ids:
            return "stop"
        if track.judge is not None and (reason := track.judge(token)):
            return reason
        if len(track.tokens) - track.num_prompt >= request.params.max_tokens:
            return "length"
        return None

    def _on_drafted(self, event: Drafted) -> None:
        """Take what is answered. A node that the reply leaves out stays asked: its answer may come with a later one."""
        self._draft_ready = True
        for expansion in event.expansions:
            if entry := self._asked.pop(expansion.node, None):
                track, node = entry
                track.tree.propose(node, expansion)

    def _finish(self, track: Track, reason: str) -> None:
        track.finished = reason
        if track.request.id in self._tracks:
            self._leave(track, keep=True)
        else:
            del self._waiting[track.request.id]
        news = Finished(self._now, track.request.id, reason)
        self._news.append(news)
        self._tell(news)

    def _bury(self, track: Track, dead: list[Node]) -> None:
        """Dead nodes: call back those in flight and those the draft was asked about, for it may be waiting for them."""
        unneeded = []
        for node in dead:
            launched, asked = self._launched.pop(node.id, None), self._asked.pop(node.id, None)
            if self._logprobs:
                self._logprobs.pop(node.id, None)
            if launched:
                node.died_at = self._now
            if launched or asked:
                unneeded.append(node.id)
        if unneeded and not self._broken:
            self.pipeline.cancel(unneeded)
        if dead and self._listeners:
            self._tell(Died(self._now, track.request.id, [node.id for node in dead]))

    # ---- counting and telling ----------------------------------------------------------------------------

    def _count(self, rows: list[tuple[Track, Node | None]], event: Landed) -> None:
        """Whose rows were alive at each stage. A row that was dropped before a stage is not in its leg."""
        dead = {node.id: node.died_at for _, node in rows if node is not None and node.died_at is not None}
        tracks = {track.request.id: track for track, _ in rows}
        if all(node is not None for _, node in rows):
            for track in tracks.values():
                track.stats.on_period(event.legs[0])
        for leg in event.legs:
            gone = [node for node in leg.nodes if node in dead and dead[node] < leg.end] if dead else []
            if len(tracks) == 1:
                next(iter(tracks.values())).stats.on_leg(leg, len(leg.nodes) - len(gone))
            else:
                self._share_leg(rows, leg, set(leg.nodes).difference(gone))

    @staticmethod
    def _share_leg(rows: list[tuple[Track, Node | None]], leg: Leg, alive: set[int]) -> None:
        """The same for a flight of several requests; prompt rows never die."""
        for track in {track.request.id: track for track, _ in rows}.values():
            track.stats.on_leg(leg, sum(owner is track and (node is None or node.id in alive) for owner, node in rows))

    def _tell_launched(self, flight: Flight, rows: list[tuple[Track, Node | None]]) -> None:
        nodes = [node for _, node in rows if node is not None]
        self._tell(Launched(self._now, flight.id, [node.id for node in nodes],
                            [node.parent.id if node.parent else -1 for node in nodes],
                            [node.token for node in nodes], [node.position for node in nodes],
                            [track.request.id for track, node in rows if node is not None],
                            Counter(track.request.id for track, node in rows if node is None)))

    def _tell(self, event: Event) -> None:
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed and is dropped")
                self._listeners.remove(listener)

    # ---- invariants --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError unless every tree, slot and table is as it must be (tests, idle servers)."""
        for track in self._tracks.values():
            track.check()
        flying = {node.id for track in self._tracks.values() for node in track.tree.flying.values()}
        assert flying == set(self._launched), "launched nodes and trees disagree"
        assert all(node.waiting for _, node in self._asked.values())
        held = [track.slots.capacity for track in self._tracks.values()] + [one.capacity for one in self.ledger.kept]
        assert self.ledger.used == sum(held), "cache slots are miscounted"


def _age(track: Track) -> tuple[float, int]:
    """The oldest request is the least."""
    return track.stats.started, track.request.id


def _kept(track: Track) -> Kept:
    """What others may take over of a request: whatever the stations have been told is committed; it is computed before
    they are asked to copy it."""
    known = len(track.path_slots)
    stages, draft = (min(one.commits, known) if one.opened else 0 for one in (track.stages, track.draft))
    return Kept(track.arena, track.slots.capacity, track.tokens, track.path_slots, stages, draft, track.stages.opened,
                track.draft.opened)


def _not_in_draft(node: Node) -> list[Node]:
    """The node, and before it those of its ancestors that the draft has not computed. (A node is sent after
    its ancestors, so above the first that is known all are.)"""
    missing = [node]
    while (parent := missing[-1].parent) is not None and not parent.in_draft:
        missing.append(parent)
    missing.reverse()
    return missing
