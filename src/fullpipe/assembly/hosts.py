"""The stations sit on several hosts: a plan says where, and another one when a host has gone or come."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fullpipe.assembly.prepare import Prepared, Say, draft_spec, silent, stage_specs, taps_of
from fullpipe.cluster.contact import Contact, RayContact
from fullpipe.cluster.guesser import draft_model, guesser_of
from fullpipe.cluster.hosts import read_hosts
from fullpipe.cluster.pins import Pins
from fullpipe.cluster.placing import Placing
from fullpipe.cluster.plan import Plan, check_shape
from fullpipe.cluster.report import HostReport, Problem
from fullpipe.cluster.wanted import Wanted
from fullpipe.costs import Machine
from fullpipe.errors import UsageError
from fullpipe.hub import resolve
from fullpipe.live_costs import LiveMachine
from fullpipe.methods import Method
from fullpipe.options import Options, PipelineOptions
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.stations.spec import StationSpec

_TYPICAL_ROWS = 4
_MATTERS = 0.2  # of the slowest stage
_AGENTS_S = 30.0  # Ray says after a minute that it cannot reach a host

Tell = Callable[[Sequence[HostReport], Sequence[Problem], Mapping[str, int]], None]
"""Shows the hosts, what is wrong with them, and the bytes of memory that each must have."""


def contact_of(asked: PipelineOptions) -> Contact:
    """The way to the hosts that the options name, which all answer. Raises UsageError, MissingExtra without Ray, and
    PipelineError for a host that cannot be reached."""
    assert asked.hosts is not None
    wanted = None if asked.hosts == "ray" else read_hosts(Path(asked.hosts))
    contact = RayContact(asked.ray_address, wanted, said_of_head(asked))
    try:
        contact.await_agents(min(asked.start_timeout, _AGENTS_S))
    except BaseException:
        contact.close()
        raise
    return contact


def said_of_head(asked: PipelineOptions) -> dict[str, Any]:
    """What the options say of this host, by the names of a HostEntry."""
    said = {"interface": asked.interface, "host_ip": asked.host_ip, "port": asked.data_port or None}
    return {name: value for name, value in said.items() if value is not None}


def placing_of(prepared: Prepared, contact: Contact, auto: bool, say: Say = silent,
               tell: Tell | None = None) -> Placing:
    """Who will decide where the stations of a model sit. auto: and by which method they are filled. Raises what reading
    a plan raises."""
    options, target = prepared.options, prepared.target
    guesses = draft_model(prepared.drafts)
    models = tuple(name for name in (options.model.model, guesses) if name)
    given = given_plan(options)
    if given:
        check_shape(given, list(contact.entries), target.config.num_layers)
    wanted = Wanted(
        model=options.model.model, draft=",".join(prepared.drafts) or "none", models=models,
        paths=tuple(Path(path) for path in (target.path, *([resolve(guesses)] if guesses else []))),
        guesser=guesser_of(options.model.model, prepared.drafts, adapter=target.lora), adapter=target.lora,
        describe=_Described(prepared, contact.head).of,
        dtype=options.model.dtype, quantization=options.model.quantization, device=target.device,
        threads=options.pipeline.threads, kernels=target.device == "cpu")
    placing = Placing(contact, wanted, _pins(prepared, contact, auto), given, say)
    if tell:
        placing.tell = tell
    return placing


def given_plan(options: Options) -> Plan | None:
    """The plan that the options name. Raises UsageError for one of another model, and where the options say themselves
    what a plan says, and what reading it raises."""
    if not (path := options.pipeline.plan):
        return None
    for name, value in (("stages", options.pipeline.stages), ("width", options.method.width)):
        if value is not None:
            raise UsageError(f"the plan {path} says what `{name}={value}` does", param=name,
                             hint=f"Leave out `{name}`, and edit the plan; or make another one: `fullpipe plan`.")
    plan = Plan.load(path)
    if plan.model != options.model.model:
        raise UsageError(f"the plan {path} is for {plan.model}, not {options.model.model}",
                         hint="Name its model, or make a plan for yours: `fullpipe plan`.")
    return plan


def _pins(prepared: Prepared, contact: Contact, auto: bool) -> Pins:
    """What the options leave to the planner, and what they do not. A method that the planner does not know is placed as
    `fullpipe` is."""
    own, stages = prepared.options.method, prepared.options.pipeline.stages
    if stages is not None and not 1 <= stages <= len(contact.entries):
        raise UsageError(f"{stages} stages are asked for, and there are {len(contact.entries)} hosts",
                         hint="A host has one stage. Start more hosts, or ask for fewer stages; without `stages` the "
                              "planner says how many.")
    return Pins(width=own.width, method="auto" if auto else "pp" if own.method == "pp" else "fullpipe", stages=stages)


@dataclass(frozen=True)
class _Described:
    """Describes the stations of any plan for one model. prepared: for one stage. head: the engine's host."""

    prepared: Prepared
    head: str

    def of(self, plan: Plan) -> tuple[list[StationSpec], StationSpec | None]:
        target = replace(self.prepared.target, ends=tuple(stage.last for stage in plan.stages))
        stages = stage_specs(target, margins=self.prepared.options.model.margins, taps=taps_of(self.prepared.drafts))
        guesses = plan.method != "pp"
        draft_host = plan.draft_host or self.head
        there = Counter([*(stage.host for stage in plan.stages), *([draft_host] if guesses else [])])
        described = [_with(spec, _placed(stage.device, there[stage.host])) for spec, stage in zip(stages, plan.stages)]
        beside = replace(target, sharing=there[draft_host])
        return described, draft_spec(self.prepared.drafts, beside, silent) if guesses else None


def _placed(device: str, sharing: int) -> dict[str, Any]:
    """What a builder is told of its device: stations of one host share its memory."""
    return {"sharing": sharing} if device == "cpu" else {"device": device}


def _with(spec: StationSpec, placed: dict[str, Any]) -> StationSpec:
    return StationSpec(spec.builder, {key: value for key, value in spec.args.items()
                                      if key not in ("sharing", "device")} | placed)


@dataclass(frozen=True, slots=True)
class _Running:
    """Is what is known of the newest pipeline. machine: what its method knows of the stations; planned: what the plan
    said of them."""

    plan: Plan
    machine: LiveMachine
    planned: Machine


@dataclass(slots=True)
class OnHosts:
    """Starts pipelines on hosts: the first, and others after it. auto: the plan says which method fills them.

    Who watches the hosts has a thread of its own, while the engine's starts pipelines: what belongs together is
    exchanged as one.
    """

    prepared: Prepared
    placing: Placing
    auto: bool
    _running: _Running | None = None
    _exchanging: threading.Lock = field(default_factory=threading.Lock)

    @property
    def machine(self) -> LiveMachine | None:
        """What the method of the newest pipeline knows of its stations."""
        return self._running.machine if self._running else None

    def first(self) -> tuple[Pipeline, Method]:
        return self._started(self.placing.decide())

    def again(self) -> tuple[Pipeline, Method]:
        """Another one, for the hosts that are there now; hosts that have come can wait for `better` if somebody asks
        for that."""
        adaptive = self.prepared.options.pipeline.adaptive
        return self._started(self.placing.decide_again(newcomers=not adaptive))

    def better(self, gain: float) -> str | None:
        """Why another pipeline would be better, one that promises a token in at most `gain` of the time; None: there is
        none."""
        return self.placing.better(gain)

    def slower(self) -> dict[str, float]:
        """By how much each host's stages take longer than planned, at a few rows. One whose difference is small beside
        what the slowest stage takes matters to nobody, and is left out."""
        if (running := self._running) is None:
            return {}
        now, then = ([curve(_TYPICAL_ROWS) for curve in machine.stages]
                     for machine in (running.machine, running.planned))
        matters = _MATTERS * max(then)
        return {stage.host: seconds / max(before, 1e-9)
                for stage, seconds, before in zip(running.plan.stages, now, then) if abs(seconds - before) > matters}

    def take_for(self, host: str, factor: float) -> None:
        """Plan from now on with a host that takes so many times as long as it was planned with. Nothing happens if that
        pipeline is gone meanwhile."""
        running = self._running
        planned = self.placing.take_for(host, factor, running.plan) if running else None
        with self._exchanging:
            if running and planned and self._running is running:
                self._running = replace(running, planned=planned)

    def _started(self, plan: Plan) -> tuple[Pipeline, Method]:
        say, asked = self.placing.say, self.prepared.options.pipeline
        for line in told(plan):
            say(line)
        stages, draft = self.placing.wanted.describe(plan)
        planned, hosting = self.placing.machine(plan), self.placing.hosting(plan)
        running = _Running(plan, LiveMachine(planned), planned)
        method = self._method(plan, running.machine)  # whatever may fail comes before there is something to be ended
        pipeline = WorkersPipeline(stages, draft, threads=asked.threads or 1, timeout=asked.timeout,
                                   heartbeat_timeout=asked.host_timeout, start_timeout=asked.start_timeout,
                                   hosting=hosting)
        with self._exchanging:
            self._running = running
        return pipeline, method

    def _method(self, plan: Plan, machine: Machine) -> Method:
        own = self.prepared.options.method.method
        name = plan.method if self.auto and plan.method != "auto" else own
        return self.prepared.method(machine, name, width=plan.width if name == "fullpipe" else None)


def told(plan: Plan) -> list[str]:
    """What a user should know of a plan."""
    where = ", ".join(f"{stage.host} layers {stage.first} to {stage.last - 1}" if stage.num_layers else
                      f"{stage.host} the head" for stage in plan.stages)
    draft = f"; draft on {plan.draft_host}" if plan.draft_host and plan.method != "pp" else ""
    lines = [f"plan: {where}{draft}"]
    if plan.promise:
        lines.append(f"predicted: {plan.promise.plan_ms:.1f} ms a token with {plan.method}, {plan.promise.pp_ms:.1f} "
                     "ms without a draft")
    return lines
