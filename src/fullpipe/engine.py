"""The one loop: events in, flights out.

Knows requests, trees, slots and a policy. Knows no torch, no processes and no kind of clock: whether the
pipeline is this process, eight machines or a simulation cannot be told from here. Read `Engine.step`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import count

from fullpipe.errors import PipelineError, StationFailed, UsageError
from fullpipe.messages import (
    Died,
    Drafted,
    Emitted,
    Event,
    Failed,
    Finished,
    Flight,
    Landed,
    Launched,
    Leg,
    Opening,
    Part,
    Ready,
)
from fullpipe.pipeline.base import Pipeline
from fullpipe.policies.base import Policy
from fullpipe.request import Request
from fullpipe.track import Track
from fullpipe.tree.token_tree import Node

log = logging.getLogger(__name__)

_AFTER_FAILURE = "What was emitted is kept. Start again; if the station was only slow, allow it a longer time-out."

Judge = Callable[[int], str | None]
"""Looks at each emitted token and returns a finish reason to end the request there, or None."""

Listener = Callable[[Event], None]


class Engine:
    """Drives requests through a pipeline under a policy.

    chunk: prompt tokens per flight. top_k: children the draft may propose per node.
    spare: slots per request beyond prompt and answer, for speculation.
    listeners: called with every event, the engine's own included; one that raises is dropped and logged.
    """

    def __init__(self, pipeline: Pipeline, policy: Policy, *, chunk: int = 256, top_k: int = 16,
                 spare: int | None = None, listeners: Iterable[Listener] = ()) -> None:
        self.pipeline = pipeline
        self.policy = self._checked(policy)
        self._chunk = chunk
        self._top_k = top_k
        self._spare = spare
        self._listeners = list(listeners)
        self._tracks: dict[int, Track] = {}
        self._judges: dict[int, Judge] = {}
        self._node_ids, self._flight_ids, self._job_ids = count(), count(), count()
        self._launched: dict[int, tuple[Track, Node]] = {}  # by node id, until they land or die
        self._asked: dict[int, tuple[Track, Node]] = {}  # by node id, until the draft answers
        self._flights: dict[int, list[tuple[Track, Node | None]]] = {}  # rows of what is under way
        self._closes: dict[str, list[int]] = {"stages": [], "draft": []}
        self._stage_ready = False
        self._draft_ready = True
        self._broken = False  # for good, once a step ended in the middle
        self._now = pipeline.now()
        self._news: list[Emitted | Finished] = []

    # ---- the front ---------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._tracks)

    def submit(self, request: Request, judge: Judge | None = None) -> Track:
        """Take a request in. The track's `stats` grow while it runs and stay valid after its end."""
        self._check_whole()
        assert request.id not in self._tracks, "request ids must be unique"
        ample = 64 + 4 * self.pipeline.num_stages * self.policy.width
        spare = max(ample if self._spare is None else self._spare, self.policy.least_slots)
        capacity = len(request.prompt) + request.params.max_tokens + spare
        track = Track.begin(request, capacity, self._node_ids, self.pipeline.now())
        self._tracks[request.id] = track
        if judge is not None:
            self._judges[request.id] = judge
        return track

    def abort(self, request: int) -> None:
        """End a request now; what it had in flight is cancelled. Unknown or finished ids are ignored."""
        if track := self._tracks.get(request):
            self._finish(track, "abort")

    def use(self, policy: Policy) -> None:
        """Change the policy while no request runs; what is left in the pipeline is waited for."""
        self.drain()
        self.policy = self._checked(policy)

    def drain(self) -> None:
        """Wait until the stations are empty and have closed the arenas of finished requests."""
        self._check_whole()
        if self._tracks:
            raise UsageError("another request is running", hint="Wait for it, or close its stream first.")
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

    def step(self) -> list[Emitted | Finished]:
        """Send what can be sent, wait for the next events, act on them. Returns what users want to know.

        Raises StationFailed when a stage or the draft is gone; what was emitted before stands in the tracks.
        After an exception of any kind, Ctrl-C included, nobody knows what the stations hold: the engine
        takes nothing more.
        """
        try:
            return self._step()
        except BaseException:
            self._broken = True
            raise

    def _step(self) -> list[Emitted | Finished]:
        self._send()
        for event in self.pipeline.events():
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
        self._send()
        news, self._news = self._news, []
        return news

    # ---- out: flights and draft jobs ---------------------------------------------------------------------

    def _send(self) -> None:
        if self._stage_ready and (flight := self._next_flight()):
            self._stage_ready = False
            self.pipeline.launch(flight)
        if self._draft_ready and self.pipeline.has_draft and (job := self._next_job()):
            self._draft_ready = False
            self.pipeline.draft(job)

    def _next_flight(self) -> Flight | None:
        flight = Flight(-1, opens=self._openings("stages"), closes=self._closings("stages"))
        rows: list[tuple[Track, Node | None]] = []
        for track in self._tracks.values():
            part = self._flight_part(track, rows)
            if len(part):
                track.seal(part, track.stages)
                flight.parts.append(part)
        if not (flight.parts or flight.opens or flight.closes):
            return None
        flight.id = next(self._flight_ids)
        self._flights[flight.id] = rows
        if self._listeners:
            self._tell_launched(flight, [node for _, node in rows if node is not None])
        return flight

    def _flight_part(self, track: Track, rows: list[tuple[Track, Node | None]]) -> Part:
        """The rest of the prompt, or its next chunk, and then what the policy says."""
        part = track.committed_rows(track.stages, self._chunk)
        rows += [(track, None)] * len(part)
        if track.stages.rows < track.tree.root.position:
            return part
        nodes = self.policy.launch(track.tree, track.room)
        if nodes:
            track.tree.new_flight()
            track.stats.on_launch(self._now, len(nodes))
        for node in nodes:
            track.tree.launch(node)
            track.add_node(part, track.stages, node, wants=True)
            self._launched[node.id] = (track, node)
            rows.append((track, node))
        return part

    def _next_job(self) -> Flight | None:
        job = Flight(-1, opens=self._openings("draft"), closes=self._closings("draft"), top_k=self._top_k)
        for track in self._tracks.values() if self.policy.needs_draft else ():
            part = self._job_part(track)
            if len(part):
                track.seal(part, track.draft)
                job.parts.append(part)
                track.stats.draft_calls += 1
                track.stats.draft_rows += len(part)
        if not (job.parts or job.opens or job.closes):
            return None
        job.id = next(self._job_ids)
        return job

    def _job_part(self, track: Track) -> Part:
        """What the draft has not seen of the committed path, and then the nodes to propose children for, each after
        those of its ancestors that the draft has not computed. One that is asked about again is sent again."""
        part = track.committed_rows(track.draft, self._chunk)
        if track.draft.rows < track.tree.root.position:
            return part
        nodes = self.policy.expand(track.tree, track.room)
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
        return part

    def _openings(self, channel: str) -> list[Opening]:
        openings = []
        for track in self._tracks.values() if channel == "stages" or self.policy.needs_draft else ():
            state = track.stages if channel == "stages" else track.draft
            if not state.opened:
                state.opened = True
                openings.append(track.opening())
        return openings

    def _closings(self, channel: str) -> list[int]:
        closes, self._closes[channel] = self._closes[channel], []
        return closes

    # ---- in: landings and drafts -------------------------------------------------------------------------

    def _on_landed(self, event: Landed) -> None:
        self._count(self._flights.pop(event.flight), event)
        touched: dict[int, Track] = {}
        margins = dict(zip(event.nodes, event.margins))
        others: Sequence[Sequence[int]] = event.others or [()] * len(event.nodes)
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
            track.stats.on_emit(self._now, step.hit, last=reason is not None, altered=step.altered)
            news = Emitted(self._now, track.request.id, root.id, step.token, root.position + 1, step.hit,
                           margins.get(root.id), step.altered)
            self._news.append(news)
            self._tell(news)
            if reason is not None:
                self._finish(track, reason)

    def _verdict(self, track: Track, token: int) -> str | None:
        request = track.request
        if token in request.eos or token in request.params.stop_token_ids:
            return "stop"
        if (judge := self._judges.get(request.id)) and (reason := judge(token)):
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
        dead = track.tree.clear()
        track.release([node for node in dead if node is not track.tree.root])
        self._bury(track, dead)
        del self._tracks[track.request.id]
        self._judges.pop(track.request.id, None)
        for channel, state in (("stages", track.stages), ("draft", track.draft)):
            if state.opened:
                self._closes[channel].append(track.request.id)
        news = Finished(self._now, track.request.id, reason)
        self._news.append(news)
        self._tell(news)

    def _bury(self, track: Track, dead: list[Node]) -> None:
        """Dead nodes: call back those in flight and those the draft was asked about, for it may be waiting for them."""
        unneeded = []
        for node in dead:
            launched, asked = self._launched.pop(node.id, None), self._asked.pop(node.id, None)
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

    def _tell_launched(self, flight: Flight, nodes: list[Node]) -> None:
        self._tell(Launched(self._now, flight.id, [node.id for node in nodes],
                            [node.parent.id if node.parent else -1 for node in nodes],
                            [node.token for node in nodes], [node.position for node in nodes]))

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


def _not_in_draft(node: Node) -> list[Node]:
    """The node, and before it those of its ancestors that the draft has not computed. (A node is sent after
    its ancestors, so above the first that is known all are.)"""
    missing = [node]
    while (parent := missing[-1].parent) is not None and not parent.in_draft:
        missing.append(parent)
    missing.reverse()
    return missing
