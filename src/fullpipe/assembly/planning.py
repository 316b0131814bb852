"""Hosts, or this machine alone, are measured for a model, and the planner looks for its best place there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fullpipe.assembly.prepare import Say, draft_names, prepare, silent
from fullpipe.cluster import survey as surveys
from fullpipe.cluster.acceptance import Task
from fullpipe.cluster.guesser import draft_model, guesser_of
from fullpipe.cluster.layout import Guesser
from fullpipe.cluster.pins import FREE, Pins
from fullpipe.cluster.plan import Plan
from fullpipe.cluster.planner import Found, search
from fullpipe.cluster.survey import Survey
from fullpipe.options import ModelOptions, Options, PipelineOptions

if TYPE_CHECKING:
    from fullpipe.assembly.hosts import Tell
    from fullpipe.cluster.contact import Contact


@dataclass(frozen=True, slots=True)
class Planned:
    """Is what the planner found, in what was measured. plan: the best. guesser: who was taken to guess."""

    plan: Plan
    found: Found
    survey: Survey
    guesser: Guesser | None


def plan_for(model: ModelOptions, where: PipelineOptions, pins: Pins = FREE, task: Task | None = None, *,
             say: Say = silent, tell: Tell | None = None, contact: Contact | None = None) -> Planned:
    """The best place of a model: on the hosts that the options name, or on this machine. The model has been fetched.

    pins: what is not to be decided. task: what texts will be like; None: as those before. say: told what takes time.
    tell: shown the hosts. contact: the way to them, if it is not the one that the options name.

    Raises HostsDiffer for hosts that cannot take part, UsageError where the model has no place as it is pinned.
    """
    names = draft_names(model.model, model.draft)
    guesser = guesser_of(model.model, names, task)
    if where.hosts is not None:
        return _on_hosts(Options(model=model, pipeline=where), pins, guesser, say, tell, contact)
    there = surveys.survey(model.model, draft_model(names), threads=where.threads, device=where.device, say=say)
    found = search(there, guesser, pins)
    return Planned(_plan(found, there, model, names, pins), found, there, guesser)


def _on_hosts(options: Options, pins: Pins, guesser: Guesser | None, say: Say, tell: Tell | None,
              contact: Contact | None) -> Planned:
    from fullpipe.assembly.hosts import contact_of, placing_of

    prepared = prepare(options, say)
    contact = contact or contact_of(options.pipeline)
    try:
        placing = placing_of(prepared, contact, True, say, tell)
        placing.pins = replace(pins, stages=pins.stages or options.pipeline.stages)
        placing.wanted = replace(placing.wanted, guesser=guesser)
        plan = placing.decide()
        assert placing.found, "no plan was given"
        return Planned(plan, placing.found, placing.survey(list(placing.known.reports)), guesser)
    finally:
        contact.close()


def _plan(found: Found, there: Survey, model: ModelOptions, drafts: Sequence[str], pins: Pins) -> Plan:
    return Plan.of(found.best, there, model.model, ",".join(drafts) or "none", pins.width)
