"""Pins say what is decided already when the planner begins."""

from __future__ import annotations

from dataclasses import dataclass

from fullpipe.cluster import cuts
from fullpipe.cluster.survey import Survey
from fullpipe.errors import UsageError

METHODS = ("auto", "fullpipe", "pp", "chain")


@dataclass(frozen=True, slots=True)
class Pins:
    """Says what is decided already; None: nothing.

    hosts: that have stages, all of these and no other. order: the same, in this order. cut: the name of a cut. layers:
    how many each host of `order` has. draft_host, width, method: see `plan.Plan`. stages: how many there are.
    """

    hosts: tuple[str, ...] | None = None
    order: tuple[str, ...] | None = None
    cut: str | None = None
    layers: tuple[int, ...] | None = None
    draft_host: str | None = None
    width: int | None = None
    method: str = "auto"
    stages: int | None = None

    def check(self, survey: Survey) -> None:
        """Raises UsageError for what cannot be."""
        named = (*(self.hosts or ()), *(self.order or ()), *((self.draft_host,) if self.draft_host else ()))
        for name in named:
            if name not in survey.hosts:
                raise UsageError(f"there is no host {name}", hint=f"Known are {', '.join(survey.hosts)}.")
        for names in filter(None, (self.hosts, self.order)):
            if len(set(names)) < len(names):
                raise UsageError(f"a host has one stage, and one is named twice: {', '.join(names)}")
        if self.hosts and self.order and set(self.hosts) != set(self.order):
            raise UsageError("the order names other hosts than `hosts`", hint="Leave one of them out.")
        if self.cut is not None and self.cut not in cuts.CUTS:
            raise UsageError(f"there is no cut {self.cut!r}", hint=f"Known are {', '.join(cuts.CUTS)}.")
        if self.method not in METHODS:
            raise UsageError(f"no plan is made for the method {self.method!r}", hint=f"Known are {', '.join(METHODS)}.")
        if self.width is not None and self.width < 1:
            raise UsageError(f"a flight has 1 row or more (got {self.width})")
        if self.stages is not None and not 1 <= self.stages <= min(len(survey.hosts), survey.num_layers):
            raise UsageError(f"{self.stages} stages are pinned, and there are {len(survey.hosts)} hosts for them and "
                             f"{survey.num_layers} layers", hint="A host has one stage. Ask for fewer, or add hosts.")
        if self.layers is not None:
            self._check_layers(survey.num_layers)

    def _check_layers(self, num_layers: int) -> None:
        assert self.layers is not None
        if self.order is None or len(self.layers) != len(self.order):
            raise UsageError("layers are pinned for hosts whose order is not", hint="Pin the order too, a number of "
                             "layers for each of its hosts.")
        if sum(self.layers) != num_layers or min(self.layers) < 0:
            raise UsageError(f"the model has {num_layers} layers, and {'+'.join(map(str, self.layers))} are pinned")


FREE = Pins()
"""Nothing is decided."""
