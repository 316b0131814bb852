"""Stations are started as they were described, and what it takes to answer is put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fullpipe.assembly.costs import costs_of, kept_costs, kept_fates, measured
from fullpipe.assembly.prepare import Prepared, Say, draft_spec, prepare, silent
from fullpipe.cluster.alone import choose
from fullpipe.cluster.kept import KeptFates
from fullpipe.methods import Method
from fullpipe.options import Options
from fullpipe.pipeline.base import Pipeline, Remade
from fullpipe.pipeline.links import Link, Links
from fullpipe.sequences.calibration import Calibration
from fullpipe.stations.base import DraftLike, StageLike
from fullpipe.threads import cores

if TYPE_CHECKING:
    from fullpipe.assembly.hosts import OnHosts, Tell
    from fullpipe.cluster.contact import Contact

_HEARTBEAT_TIMEOUT_S = 10.0
_HOSTS_PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Assembly:
    """A pipeline that runs, and nothing is under way in it. method: made for it. rebuild: starts another one like it,
    where the stations are processes that may die. calibration: how far its draft is believed to begin with.
    kept: where that is kept; None: nowhere. hosts: who starts pipelines on several hosts; None: there is one."""

    prepared: Prepared
    pipeline: Pipeline
    method: Method
    rebuild: Callable[[], Remade] | None = None
    calibration: Calibration = field(default_factory=Calibration)
    kept: KeptFates | None = None
    hosts: OnHosts | None = None

    @classmethod
    def remembering(cls, prepared: Prepared, pipeline: Pipeline, method: Method,
                    rebuild: Callable[[], Remade] | None = None, hosts: OnHosts | None = None) -> Assembly:
        """One that knows its draft from earlier."""
        kept = kept_fates(prepared)
        return cls(prepared, pipeline, method, rebuild, kept.load() if kept else Calibration(), kept, hosts)

    @property
    def patience_s(self) -> float:
        """For how long a service should try to have another pipeline: hosts that are lost may come back."""
        return _HOSTS_PATIENCE_S if self.hosts else 0.0

    def keep(self) -> None:
        """Keep what was learned of the draft, for those who come after."""
        if self.kept and self.calibration.noted:
            self.kept.save(self.calibration)

    def close(self) -> None:
        """Leave the hosts; the pipeline has been closed."""
        if self.hosts:
            self.hosts.placing.close()


def assemble(options: Options, say: Say = silent, *, contact: Contact | None = None,
             tell: Tell | None = None) -> Assembly:
    """Everything that it takes to answer, checked before the first weight is read. say: told what takes time.
    contact: the way to several hosts, if it is not the one that the options name. tell: shown the hosts.

    Raises UsageError, ModelError and their kin for what cannot be done; StationFailed when a process dies or does not
    start in time.
    """
    prepared = prepare(options, say)
    if options.pipeline.hosts is not None:
        return _assemble_on_hosts(prepared, options.method.method == "auto", say, contact, tell)
    if options.method.method == "auto" and prepared.options.method.method == "chain":
        said = options.model.draft != "auto" or options.method.depth or options.method.floor is not None
        return _assemble_what_pays(prepared, say, may_do_without=not said)
    pipeline = start(prepared, say)
    try:
        method = prepared.method(measured(prepared, pipeline, say))
    except BaseException:
        pipeline.close()
        raise
    rebuild = (lambda: start(prepared, say)) if prepared.distributed else None
    return Assembly.remembering(prepared, pipeline, method, rebuild)


def _assemble_on_hosts(prepared: Prepared, auto: bool, say: Say, contact: Contact | None,
                       tell: Tell | None) -> Assembly:
    from fullpipe.assembly.hosts import OnHosts, contact_of, placing_of

    contact = contact or contact_of(prepared.options.pipeline)
    try:
        hosts = OnHosts(prepared, placing_of(prepared, contact, auto, say, tell), auto)
        pipeline, method = hosts.first()
    except BaseException:
        contact.close()
        raise
    return Assembly.remembering(prepared, pipeline, method, hosts.again, hosts)


def start(prepared: Prepared, say: Say = silent) -> Pipeline:
    """All stations: processes, or one stage and a draft that take turns in this one."""
    options = prepared.options.pipeline
    where = "in this process" if options.stages is None else \
        "as 1 stage" if len(prepared.stages) == 1 else f"as {len(prepared.stages)} stages"
    on = "" if prepared.target.device == "cpu" else f" on {prepared.target.device}"
    say(f"loading {prepared.target.path.name} {where}{on} {prepared.target.numbers}")
    if options.stages is None:
        return _in_this_process(*prepared.build(), options.threads)
    from fullpipe.pipeline.workers import WorkersPipeline

    links = Links.even(len(prepared.stages), Link.of(options.link_ms, options.link_mbit))
    return WorkersPipeline(prepared.stages, prepared.draft, links=links, threads=options.threads or 1,
                               timeout=options.timeout, heartbeat_timeout=min(_HEARTBEAT_TIMEOUT_S, options.timeout),
                               start_timeout=options.start_timeout)


def _in_this_process(stages: Sequence[StageLike], draft: DraftLike | None, threads: int | None) -> Pipeline:
    import torch

    from fullpipe.pipeline.inprocess import InProcessPipeline

    torch.set_num_threads(threads or cores())
    return InProcessPipeline(stages, draft, clock="wall")


def _assemble_what_pays(prepared: Prepared, say: Say, may_do_without: bool) -> Assembly:
    """In one process: guess with the draft, or with n-gram alone, or not at all, whatever is quickest here."""
    stages: list[StageLike] | None = None
    machine = kept_costs(prepared).load()
    if machine is None:
        say(f"loading {prepared.target.path.name} in this process {prepared.target.numbers}")
        stages, draft = prepared.build()
        machine = costs_of(prepared, _in_this_process(stages, draft, prepared.options.pipeline.threads), say)
    best = choose(machine, prepared.drafts, may_do_without=may_do_without)
    say(best.why)
    chosen = _with_draft(prepared, best.drafts, best.depth)
    if stages is None:
        return Assembly.remembering(chosen, start(chosen, say), chosen.method())
    if best.drafts != prepared.drafts:
        draft = chosen.draft.build() if chosen.draft else None  # type: ignore[assignment]
    pipeline = _in_this_process(stages, draft, prepared.options.pipeline.threads)
    return Assembly.remembering(chosen, pipeline, chosen.method())


def _with_draft(prepared: Prepared, drafts: tuple[str, ...], depth: int) -> Prepared:
    """The same with other drafts, and so many tokens guessed at a time unless the options say how many."""
    own = prepared.options.method
    name = "chain" if drafts else "pp"
    method = replace(own, method=name, depth=(own.depth or depth) if drafts else None)
    return replace(prepared, drafts=drafts, draft=draft_spec(drafts, prepared.target, silent),
                   options=replace(prepared.options, method=method))


