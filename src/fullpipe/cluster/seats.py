"""A plan's stations have seats: where each runs, what it takes there, and what it gets from the head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from fullpipe.cluster.hosts import HostEntry
from fullpipe.cluster.links import between
from fullpipe.cluster.modes import CONTEXT
from fullpipe.cluster.plan import Plan, memory_of
from fullpipe.cluster.report import HostReport
from fullpipe.cluster.survey import Survey
from fullpipe.cluster.wanted import Wanted, everything, own_path
from fullpipe.costs import CostCurve, Machine
from fullpipe.hub.cache import from_head_folder
from fullpipe.models.partial import Source, needed
from fullpipe.models.ranges import Range, total
from fullpipe.models.weights import open_model
from fullpipe.pipeline.fetching import reads
from fullpipe.pipeline.frames import Fetch
from fullpipe.pipeline.launch.base import Launcher, Needs
from fullpipe.pipeline.starting import Hosting, Place

_ROWS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Seats:
    """Works that out. survey, reports, entries: of the hosts, as they were measured, as they report, and as the user
    has it. memory: bytes that can be reserved on them, where somebody keeps account."""

    plan: Plan
    wanted: Wanted
    survey: Survey
    reports: Mapping[str, HostReport]
    entries: Mapping[str, HostEntry]
    memory: Mapping[str, int] = field(default_factory=dict)

    # ---- who sits where ------------------------------------------------------------------------------------------

    @property
    def _stages(self) -> list[str]:
        return [stage.host for stage in self.plan.stages]

    @property
    def _drafts(self) -> list[str]:
        """The draft's host, if there is a draft."""
        guesses = self.plan.method != "pp" and self.wanted.guesser
        return [self.plan.draft_host or self.survey.head] if guesses else []

    @property
    def _all(self) -> list[str]:
        return [*self._stages, *self._drafts]

    def hosting(self, launcher: Callable[[], Launcher], say: Callable[[str], None]) -> Hosting:
        """What starts the pipeline. launcher: makes who starts processes on the hosts. say: told what takes long.
        Raises DamagedModel for files that are others than they were."""
        self.wanted.check_unchanged()
        sources = {str(path): Source(path, self.wanted.manifest(path)) for path in self.wanted.read}
        return Hosting([self._place(rank, host) for rank, host in enumerate(self._all)], self._where(self.survey.head),
                       launcher, link_s=self._link_s(self._stages), draft_link_s=self._link_s(self._drafts),
                       sources=sources, say=say)

    def _where(self, host: str) -> Place:
        return Place(host, self.reports[host].address or "", self.entries[host].port)

    def _link_s(self, hosts: Sequence[str]) -> float:
        """Seconds of the way from the head over some hosts and back; 0 over none."""
        way = pairwise([self.survey.head, *hosts, self.survey.head]) if hosts else ()
        return sum(between(self.survey.pairs, a, b).latency_s for a, b in way)

    def _place(self, rank: int, host: str) -> Place:
        paths, fetch = self._models(rank, host)
        return replace(self._where(host), needs=self._needs(rank, host), paths=paths, fetch=fetch,
                       device=self._device(host))

    def _needs(self, rank: int, host: str) -> Needs:
        stages, there = self.plan.stages, self._all.count(host)
        threads = stages[rank].threads if rank < len(stages) else self.wanted.threads or 1
        costs = self.survey.hosts[host]
        return Needs(threads, cpus=min(float(threads), costs.cores / there),
                     gpus=0.0 if costs.device == "cpu" else 1.0 / there, memory=self._reserved(host) // there)

    def _reserved(self, host: str) -> int:
        """Bytes of its memory for all its stations. Nothing where that cannot be had: what the host reports of its
        memory decides whether they have room, not what somebody was told to keep account of."""
        wanted = memory_of(self.plan, self.survey.hosts, self.wanted.guesser)[host]
        return wanted if self.survey.hosts[host].device == "cpu" and wanted <= self.memory.get(host, 0) else 0

    def _device(self, host: str) -> str:
        """What the stations of a host take turns on; "" where they need not."""
        costs = self.survey.hosts[host]
        there = [one for one in self._all if self._processor(one) == self._processor(host)]
        return self._processor(host) if len(there) > costs.slots else ""

    def _processor(self, host: str) -> str:
        return self.survey.hosts[host].processor or f"host {host}"

    # ---- what is read there --------------------------------------------------------------------------------------

    def _models(self, rank: int, host: str) -> tuple[dict[str, str], list[Fetch]]:
        """Where models lie on a host, by where they lie on the head, and what comes from there."""
        paths, fetch = dict[str, str](), list[Fetch]()
        folder = str(Path(self.reports[host].cache) / from_head_folder("x").parent.name)
        for at, path in enumerate(self.wanted.paths):
            if own := own_path(self.wanted, self.reports[host], at, self.survey.head):
                paths[str(path)] = own
            elif self._is_read(rank, path):
                ranges = self._ranges(rank) if rank < len(self.plan.stages) else everything(path)
                fetch.append(Fetch(str(path), folder, self.wanted.manifest(path), ranges))
        if (adapter := self.wanted.adapter) and host != self.survey.head and rank < len(self.plan.stages):
            manifest = self.wanted.manifest(adapter)
            fetch.append(Fetch(str(adapter), folder, manifest, manifest.everything()))
        return paths, fetch

    def _is_read(self, rank: int, path: Path) -> bool:
        """Whether a station reads a model."""
        if rank < len(self.plan.stages):
            return path == self.wanted.paths[0]
        _, draft = self.wanted.describe(self.plan)
        return draft is not None and reads(draft, str(path))

    def _ranges(self, rank: int) -> list[Range]:
        """What a stage reads of the target."""
        stage = self.plan.stages[rank]
        return needed(open_model(self.wanted.paths[0]), stage.first, stage.last, has_embedding=rank == 0,
                      has_head=rank == len(self.plan.stages) - 1)

    def weights(self) -> dict[str, dict[str, int]]:
        """Bytes of the target that the stages of each host read, by the model's name."""
        read: dict[str, Counter[str]] = {}
        for rank, host in enumerate(self._stages):
            read.setdefault(host, Counter())[self.wanted.models[0]] += total(self._ranges(rank))
        return {host: dict(sizes) for host, sizes in read.items()}

    # ---- what it takes -------------------------------------------------------------------------------------------

    def machine(self) -> Machine:
        """What a method is to know of the stations, as measured on their hosts."""
        last, guesser, draft = len(self.plan.stages) - 1, self.wanted.guesser, None
        stages = []
        for rank, stage in enumerate(self.plan.stages):
            profile = self.survey.hosts[stage.host].profile
            stages.append(CostCurve({rows: profile.stage(stage.num_layers, rows, CONTEXT, is_first=rank == 0,
                                                         is_last=rank == last) for rows in _ROWS}))
        for host in self._drafts:
            assert guesser
            draft = CostCurve({rows: guesser.call(self.survey.hosts[host].profile, rows) for rows in _ROWS})
        devices = [self._device(host) or f"core of station {rank}" for rank, host in enumerate(self._all)]
        return Machine(len(stages), draft=draft, link_s=self._link_s(self._stages),
                       draft_link_s=self._link_s(self._drafts), stages=stages, devices=devices[: len(stages)],
                       shared=draft is not None and devices[-1] == devices[0],
                       reads_taps=guesser is not None and guesser.kind == "module")
