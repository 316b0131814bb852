"""A model is placed on hosts: they are looked at, measured, planned for, and given their stages. And again when one has
gone, or come."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fullpipe.cluster.agent import Measure, Opening
from fullpipe.cluster.checks import Needs, compare, refuse
from fullpipe.cluster.contact import Contact
from fullpipe.cluster.links import Pair
from fullpipe.cluster.pins import Pins
from fullpipe.cluster.plan import Plan, check, memory_of
from fullpipe.cluster.planner import Found, predict, search
from fullpipe.cluster.profile import slower
from fullpipe.cluster.report import HostReport, Problem
from fullpipe.cluster.seats import Seats
from fullpipe.cluster.survey import HostCosts, Survey
from fullpipe.cluster.surveying import Known, look_at, measure_costs, measure_links
from fullpipe.cluster.wanted import Wanted, own_path
from fullpipe.costs import Machine
from fullpipe.errors import FullpipeError, HostsDiffer, PipelineError, UsageError
from fullpipe.pipeline.starting import Hosting

Say = Callable[[str], None]
_PAUSES_S = (3.0, 60.0)  # until a host is looked at again that did not fit: the least, doubled each time, and the most


@dataclass(frozen=True, slots=True)
class _InVain:
    """Is a host that was looked at and could not be taken in. life: of the contact. pause_s: until the next look."""

    life: str
    at: float
    pause_s: float


@dataclass(frozen=True, slots=True)
class HostView:
    """Is a host as pages and tables show it. state: "ready", or "lost", and why. stations: that it has now. head: the
    engine is there."""

    name: str
    address: str
    state: str
    stations: tuple[str, ...]
    why: str = ""
    head: bool = False


@dataclass(slots=True)
class Placing:
    """Holds what is known of the hosts, and who sits where.

    pins: what the planner is not to decide. given: a plan to be kept to as long as its hosts are there. say: told what
    takes time. tell: shown the hosts, and what is wrong with them.
    """

    contact: Contact
    wanted: Wanted
    pins: Pins = field(default_factory=Pins)
    given: Plan | None = None
    say: Say = lambda line: None
    tell: Callable[[Sequence[HostReport], Sequence[Problem], Mapping[str, int]], None] = lambda *_: None
    known: Known = field(default_factory=Known)
    plan: Plan | None = None
    found: Found | None = None
    lost: dict[str, str] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _count: int = 0  # of decisions, from their beginning
    _taken_for_others: bool = False
    _in_vain: dict[str, _InVain] = field(default_factory=dict)

    # ---- deciding ------------------------------------------------------------------------------------------------

    def decide(self) -> Plan:
        """Look at all hosts, measure them, and plan for them. Raises HostsDiffer before anything is measured where a
        host does not fit, and UsageError where the model has no place."""
        with self._lock:
            self._count += 1
            look_at(self.contact, self.wanted.models, self.known, alone=len(self.contact.entries) == 1)
            self._refuse({}, {})
            measure_links(self.contact, self.known)
            self._refuse({}, {})
            measure_costs(self.contact, self.known, self._measure, self.say)
            plan = self._plan(list(self.known.reports))
            memory = memory_of(plan, self.survey(plan.hosts).hosts, self.wanted.guesser)
            self._refuse(memory, self._weights(plan), tell=True)
            self.plan = plan
            return plan

    def decide_again(self, *, newcomers: bool = True) -> Plan:
        """Plan for the hosts that answer now and reach each other. newcomers: those that have come are looked at first,
        which takes its time; else only where there is no plan without them. A host that does not fit is left out, and
        why is said; so is one that stops answering meanwhile. Whoever looks for something better gives way."""
        with self._lock:
            self._count += 1
            while True:
                fresh = self._note_answering()
                try:
                    self._take_in(fresh if newcomers else ())
                    self.plan = self._planned_anew(() if newcomers else fresh)
                except PipelineError:
                    if set(self.known.reports) <= set(self.contact.answering()):
                        raise
                else:
                    return self.plan

    def _note_answering(self) -> list[str]:
        """Forget hosts that do not answer; those that do and are not known."""
        self.contact.refresh()
        answering = self.contact.answering()
        if self.contact.head not in answering:
            raise PipelineError("the agent on this host does not answer", hint="Start again.")
        for host in [host for host in self.known.reports if host not in answering]:
            self._lose(host, "it does not answer")
        return [host for host in answering if host not in self.known.reports]

    def _planned_anew(self, reserve: Sequence[str]) -> Plan:
        """A plan for those of the known hosts that reach each other; where there is none, with a reserve of others."""
        measure_links(self.contact, self.known, quick=True)
        self._leave_out_unreachable()
        measure_costs(self.contact, self.known, self._measure, self.say)
        try:
            return self._plan(list(self.known.reports))
        except UsageError:
            if not reserve:
                raise
        self._take_in(reserve)
        return self._planned_anew(())

    def better(self, gain: float) -> str | None:
        """Why another plan would be better: one that promises a token in at most `gain` of the time that this one would
        take now. Hosts that have come are looked at and measured for that, and those that nobody needs and that have
        gone are forgotten. None: none would, or the pipeline has lost a host and all is decided anew anyway."""
        with self._lock:
            count, plan = self._count, self.plan
            other = replace(self, known=self.known.copy(), lost=dict(self.lost), _in_vain=dict(self._in_vain),
                            _lock=threading.RLock())
        self.contact.refresh()
        answering = self.contact.answering()
        if plan is None or not {self.contact.head, *plan.hosts} <= set(answering):
            return None
        for host in [host for host in other.known.reports if host not in answering]:
            other._lose(host, "it does not answer")
        fresh = [host for host in answering if host not in other.known.reports and not self._is_vain(host)]
        try:
            why = other._better(plan, fresh, gain, lambda: count != self._count)
        except Exception as error:
            for host in [one for one in fresh if one in other.known.reports]:  # not all of it again at once
                other._lose(host, _why(error), in_vain=True)
            self._take_over(other, count)
            raise
        return why if self._take_over(other, count) else None

    def _better(self, plan: Plan, fresh: Sequence[str], gain: float, given_way: Callable[[], bool]) -> str | None:
        """See `better`. given_way: whether all is decided anew meanwhile."""
        self._take_in(fresh)
        if given_way() or not (set(fresh) & set(self.known.reports) or self._taken_for_others):
            return None
        measure_links(self.contact, self.known, missing=True, deaf=self._deaf(plan))
        self._leave_out_unreachable(stay=plan.hosts)
        if given_way():
            return None
        measure_costs(self.contact, self.known, self._measure, self.say)
        if given_way():
            return None
        best = self._plan(list(self.known.reports))
        self._taken_for_others = False
        new = [host for host in fresh if host in self.known.reports]
        if (stages := self._missing_stages(plan, best)) is not None:
            return f"{', '.join(new)} can be had: {stages} stages, as asked for"
        return _reason(plan, best, new, self.promised_ms(plan), gain)

    def _take_over(self, other: Placing, count: int) -> bool:
        """Know what was found out while something better was looked for. Not if all has been decided anew since there
        were so many decisions, or is just being."""
        with self._lock:
            if count != self._count:
                return False
            self.known, self.lost, self._in_vain = other.known, other.lost, other._in_vain
            self._taken_for_others = other._taken_for_others
            return True

    def _is_vain(self, host: str) -> bool:
        """Whether a host was looked at in vain, is still the same, and need not be looked at again yet."""
        last = self._in_vain.get(host)
        return last is not None and last.life == self.contact.life(host) and self.clock() < last.at + last.pause_s

    def _deaf(self, plan: Plan) -> set[str]:
        """Hosts with a port, which the pipeline has."""
        return {host for host in {self.contact.head, *plan.hosts} if self.known.entries[host].port}

    def _missing_stages(self, plan: Plan, best: Plan) -> int | None:
        """How many stages the better plan has, if the number is pinned and this plan has too few."""
        asked = self.pins.stages or 0
        return len(best.stages) if len(plan.stages) < len(best.stages) <= asked else None

    def promised_ms(self, plan: Plan) -> float:
        """Milliseconds per token that a plan promises, as the hosts are now."""
        found = predict(self.survey(plan.hosts), plan.layout, self.wanted.guesser, width=plan.width, method=plan.method)
        return 1e3 * found.seconds

    def take_for(self, host: str, factor: float, plan: Plan) -> Machine | None:
        """Plan from now on with a host that takes so many times as long. plan: which runs. Returns what its stations
        take then; None, and nothing is changed, if all is decided anew meanwhile."""
        with self._lock:
            if self.plan is not plan or not {host, *plan.hosts} <= set(self.known.profiles):
                return None
            self.known.profiles[host] = slower(self.known.profiles[host], factor)
            self._taken_for_others = True
            return self.machine(plan)

    def _take_in(self, fresh: Sequence[str]) -> None:
        """Look at hosts that have come; those that do not fit are left out."""
        for host in fresh:
            try:
                look_at(self.contact, self.wanted.models, self.known, alone=False, hosts=[host])
                refuse([one for one in self._problems({}, {}) if one.host == host])
            except FullpipeError as error:
                self._lose(host, _why(error), in_vain=True)
            else:
                self.lost.pop(host, None)
                self.say(f"{host} takes part")

    def _leave_out_unreachable(self, stay: Sequence[str] = ()) -> None:
        """Hosts that cannot reach each other cannot be in one pipeline. The head stays, as do those that are named; of
        two others the one goes that fewer can reach."""
        while True:
            faults = Counter[str]()
            for host, report in self.known.reports.items():
                for other, reason in report.reaches.items():
                    if reason and other in self.known.reports:
                        faults.update(one for one in (host, other) if one not in (self.contact.head, *stay))
            if not faults:
                self._in_vain = {host: last for host, last in self._in_vain.items() if host not in self.known.reports}
                return
            self._lose(faults.most_common(1)[0][0], "it cannot be reached, or cannot reach others", in_vain=True)

    def _lose(self, host: str, why: str, *, in_vain: bool = False) -> None:
        """in_vain: it answers, so it would be looked at again and again."""
        self.known.forget(host)
        if self.lost.get(host) != why:
            self.say(f"going on without {host}: {why}")
        self.lost[host] = why
        if in_vain:
            least, most = _PAUSES_S
            last, life = self._in_vain.get(host), self.contact.life(host)
            pause_s = min(2 * last.pause_s, most) if last and last.life == life else least
            self._in_vain[host] = _InVain(life, self.clock(), pause_s)

    def _plan(self, hosts: Sequence[str]) -> Plan:
        """The given one while its hosts are there, else the best."""
        survey, wanted = self.survey(hosts), self.wanted
        if self.given and (self.plan is None or set(self.given.hosts) <= set(hosts)):
            check(self.given, survey.hosts, survey.num_layers, wanted.guesser)
            return self.given
        pins = self.pins if self.plan is None else _still(self.pins, hosts)
        self.found = search(survey, wanted.guesser, pins)
        return Plan.of(self.found.best, survey, wanted.model, wanted.draft, self.pins.width)

    def survey(self, hosts: Sequence[str]) -> Survey:
        """What is known of these hosts, and of the head."""
        names = list(dict.fromkeys([self.contact.head, *hosts]))
        entries, reports = self.known.entries, self.known.reports
        costs = {name: HostCosts(self.known.profiles[name], self._cores(name), reports[name].free_memory,
                                 processor=self.known.processors[name], device=self._device(entries[name].device))
                 for name in names}
        pairs = {pair: link for pair, link in self.known.pairs.items() if set(pair) <= set(names)}
        return Survey(costs, self.contact.head, pairs)

    def _device(self, own: str) -> str:
        return self.wanted.device if own == "cpu" else own

    # ---- what hosts must have ------------------------------------------------------------------------------------

    def _problems(self, memory: Mapping[str, int], weights: Mapping[str, dict[str, int]]) -> list[Problem]:
        reports = dict(self.known.reports)
        head = reports.pop(self.contact.head)
        devices = {host: [self._device(entry.device)] for host, entry in self.known.entries.items()}
        needs = Needs(devices=devices, memory=dict(memory), weights=dict(weights), kernels=self.wanted.kernels,
                      ray=self.contact.by_ray)
        return compare(head, list(reports.values()), needs)

    def _refuse(self, memory: Mapping[str, int], weights: Mapping[str, dict[str, int]], *, tell: bool = False) -> None:
        """Raises HostsDiffer where something is wrong with a host; shows all hosts then, or if asked to."""
        problems = self._problems(memory, weights)
        if tell or any(problem.stops for problem in problems):
            head = self.contact.head
            ordered = sorted(self.known.reports.values(), key=lambda report: report.name != head)
            self.tell(ordered, problems, memory)
        refuse(problems)

    def _weights(self, plan: Plan) -> dict[str, dict[str, int]]:
        """Bytes of models that each host reads, by their names."""
        return self._seats(plan).weights()

    def _measure(self, host: str) -> Measure:
        """What a host is asked to measure: with its own files, or with models of zeros laid out like the head's."""
        wanted, report = self.wanted, self.known.reports[host]
        models: list[str | Opening] = [own_path(wanted, report, at, self.contact.head) or wanted.opening(path)
                                       for at, path in enumerate(wanted.paths)]
        return Measure(models=models, threads=self._threads(host), dtype=wanted.dtype,
                       quantization=wanted.quantization, device=self._device(self.known.entries[host].device))

    def _threads(self, host: str) -> int:
        """Of a stage: all cores, but one of the head's, which has the engine and the draft."""
        return self.wanted.threads or max(1, self._cores(host) - (host == self.contact.head))

    def _cores(self, host: str) -> int:
        """That stations may have there."""
        there = self.known.reports[host].cores
        return min(there, self.contact.cores(host) or there)

    # ---- starting ------------------------------------------------------------------------------------------------

    def hosting(self, plan: Plan) -> Hosting:
        """Where the stations of a plan run. Raises DamagedModel where the model's files are others than they were."""
        return self._seats(plan).hosting(self.contact.launcher, self.say)

    def machine(self, plan: Plan) -> Machine:
        """What a method is to know of a plan's stations, as measured on their hosts."""
        return self._seats(plan).machine()

    def _seats(self, plan: Plan) -> Seats:
        there = self.survey(plan.hosts)
        return Seats(plan, self.wanted, there, self.known.reports, self.known.entries,
                     {host: self.contact.memory(host) for host in there.hosts})

    # ---- showing -------------------------------------------------------------------------------------------------

    def view(self) -> list[HostView]:
        """All hosts that take part, or did. It waits for nobody, so what is decided meanwhile may show in part."""
        plan, head, reports, lost = self.plan, self.contact.head, dict(self.known.reports), dict(self.lost)
        stations: dict[str, list[str]] = {}
        for rank, stage in enumerate(plan.stages if plan else ()):
            stations.setdefault(stage.host, []).append(f"stage {rank}")
        if plan and plan.method != "pp" and self.wanted.guesser:
            stations.setdefault(plan.draft_host or head, []).append("draft")
        here = [HostView(name, report.address or "", "ready", tuple(stations.get(name, ())), head=name == head)
                for name, report in reports.items()]
        return here + [HostView(name, "", "lost", (), why) for name, why in lost.items() if name not in reports]

    def links(self) -> dict[tuple[str, str], Pair]:
        """What was measured between the hosts."""
        return dict(self.known.pairs)

    def close(self) -> None:
        self.contact.close()


def _why(error: Exception) -> str:
    """A host takes no part."""
    if isinstance(error, HostsDiffer):
        return ", ".join(what for _, what, _ in error.problems)
    return error.message if isinstance(error, FullpipeError) else f"{type(error).__name__}: {error}"


def _reason(plan: Plan, best: Plan, fresh: Sequence[str], now_ms: float, gain: float) -> str | None:
    if best.layout == plan.layout and best.method == plan.method:
        return None
    promised = best.promise.plan_ms if best.promise else 0.0  # a given plan is kept to, whatever it promises
    if promised > gain * now_ms:
        return None
    why = f"{', '.join(fresh)} can be had" if fresh else "hosts take other times than planned"
    return f"{why}: {promised:.1f} ms a token instead of {now_ms:.1f}"


def _still(pins: Pins, hosts: Sequence[str]) -> Pins:
    """What of the pins can still be after hosts have gone."""
    gone = any(name not in hosts for name in (*(pins.hosts or ()), *(pins.order or ())))
    draft_host = pins.draft_host if pins.draft_host in hosts else None
    stages = min(pins.stages, len(hosts)) if pins.stages else None
    left = replace(pins, draft_host=draft_host, stages=stages)
    return replace(left, hosts=None, order=None, layers=None) if gone else left
