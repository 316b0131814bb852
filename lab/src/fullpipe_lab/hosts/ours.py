"""Fullpipe on the hosts of a lab: the head is a process on the first of them, and every host has a stage.

    with start_cluster(lab, Cluster(model, draft, hosts=2)) as running:
        answer = running.ask(prompt, 64, "fullpipe")

Hosts share this machine's cores: the first, third, ... have core 0, the others core 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fullpipe_lab.hosts.places import Answer, Places
from fullpipe_lab.peers.known import HEAD_RUNNER
from fullpipe_lab.peers.process import Runner

_START_S = 600.0
_CORES = 2


@dataclass(frozen=True, slots=True)
class Cluster:
    """What stands on the hosts: a stage each."""

    model: str
    draft: str
    hosts: int
    dtype: str = "auto"


class Running:
    """A cluster that can be asked from the head. settings: what it tells of itself."""

    def __init__(self, runner: Runner, settings: dict[str, Any]) -> None:
        self._runner, self.settings = runner, settings

    def ask(self, prompt: Sequence[int], tokens: int, method: str, size: int | None = None,
            limit_s: float = 1200.0) -> Answer:
        """Greedily. size: width, or depth, of the method; None: its own. Raises RunnerFailed."""
        return Answer.of(self._runner.ask({"prompt": list(prompt), "max_tokens": tokens, "method": method,
                                           "size": size}, limit_s))


@contextmanager
def start_cluster(lab: Places, on: Cluster) -> Iterator[Running]:
    """All stations, until the context ends. Raises RunnerFailed where they do not start."""
    names = [f"h{number}" for number in range(1, on.hosts + 1)]
    cores = {name: number % _CORES for number, name in enumerate(names)}
    options = {"model": on.model, "draft": on.draft, "dtype": on.dtype, "method": "fullpipe", "stages": on.hosts,
               "adaptive": False, "host_timeout": 20.0}
    commands = {name: lab.command(name, [], core=cores[name]) for name in names[1:]}
    head = lab.command(names[0], [sys.executable, str(HEAD_RUNNER)], core=cores[names[0]])
    with Runner(head, os.environ | {"HF_HUB_OFFLINE": "1"}) as runner:
        said = runner.ask({"options": options, "hosts": {name: lab.address(name) for name in names},
                           "commands": commands}, _START_S)
        yield Running(runner, {"version": said["version"], **said["settings"]})
