"""A survey says what there is to plan for: what each host's stations cost, and what lies between the hosts.

`survey` looks at this machine alone. Whoever can reach others adds theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fullpipe.cluster.links import Pairs
from fullpipe.cluster.profile import Profile
from fullpipe.errors import UsageError
from fullpipe.threads import cores

THIS_HOST = "here"
_KEPT_FREE = 0.1  # share of a host's free memory that a plan leaves alone


@dataclass(frozen=True, slots=True)
class HostCosts:
    """Is what a plan needs to know of a host.

    profile: what a station takes there, with its threads. cores: that stations may use. free_bytes: of memory.
    processor: hosts of one name share the cores; empty: the host has its own. device: where a stage computes.
    """

    profile: Profile
    cores: int
    free_bytes: int
    processor: str = ""
    device: str = "cpu"

    @property
    def slots(self) -> int:
        """Stations that can compute at the same time; more take turns."""
        return 1 if self.device != "cpu" else max(self.cores // self.profile.threads, 1)

    @property
    def room(self) -> int:
        """Bytes that stations may take."""
        return int(self.free_bytes * (1 - _KEPT_FREE))


@dataclass(frozen=True, slots=True)
class Survey:
    """hosts: by name. pairs: the way from each to each. head: the host where the engine runs."""

    hosts: Mapping[str, HostCosts]
    head: str
    pairs: Pairs = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.head not in self.hosts:
            raise UsageError(f"the head {self.head} is none of the hosts", hint=f"Known are {', '.join(self.hosts)}.")
        layers = {host.profile.num_layers for host in self.hosts.values()}
        if len(layers) > 1:
            raise UsageError("the hosts were measured with different models: they have "
                             f"{' and '.join(map(str, sorted(layers)))} layers", hint="Measure them all again.")

    @property
    def num_layers(self) -> int:
        return self.hosts[self.head].profile.num_layers


def survey(model: str, draft: str | None = None, *, threads: int | None = None, device: str = "cpu",
           say: Callable[[str], None] = lambda line: None) -> Survey:
    """This machine alone. draft: a model, or None. threads: of a station; None: all cores. say: told what takes
    time."""
    from fullpipe.cluster.quick import quick_profile
    from fullpipe.models.memory import free_memory

    here = os.uname().nodename or THIS_HOST
    profile = quick_profile(model, draft, threads or cores(), device=device, say=say)
    return Survey({here: HostCosts(profile, cores(), free_memory(), device=device)}, here)
