"""Fullpipe on the hosts of a lab: the head is a process on the first of them.

    with start_cluster(lab, Cluster(model, draft, hosts=2, delay_ms=10), "fullpipe") as running:
        answer = running.ask(prompt, 64)

**For now all stages stand beside the head, on links that are emulated**, and `settings` says so ("links": "emulated"):
the head runs in its namespace, what is between stages does not. Whoever has stages on hosts puts them here, in
`start_cluster` and in `peers/runners/hosts_head.py`, and nowhere else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fullpipe_lab.hosts.places import HEAD, Answer, Places
from fullpipe_lab.peers.known import HEAD_RUNNER
from fullpipe_lab.peers.process import Runner

_START_S = 600.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """What stands on the hosts: a stage each. delay_ms: of every link of the lab, one way."""

    model: str
    draft: str
    hosts: int
    delay_ms: float
    dtype: str = "auto"


class Running:
    """A cluster that can be asked from the head. settings: what it tells of itself. promise_ms: predicted time between
    tokens; None where nobody predicts."""

    def __init__(self, runner: Runner, settings: dict[str, Any]) -> None:
        self._runner, self.settings = runner, settings
        self.promise_ms: float | None = settings.get("promise_ms")

    def ask(self, prompt: Sequence[int], tokens: int, size: int | None = None, limit_s: float = 1200.0) -> Answer:
        """Greedily. size: width, or depth, of the method; None: its own. Raises RunnerFailed."""
        return Answer.of(self._runner.ask({"prompt": list(prompt), "max_tokens": tokens, "size": size}, limit_s))


@contextmanager
def start_cluster(lab: Places, on: Cluster, method: str) -> Iterator[Running]:
    """All stations, until the context ends. Raises RunnerFailed where they do not start."""
    options = {"model": on.model, "draft": on.draft if method != "pp" else "none", "dtype": on.dtype, "method": method,
               "stages": on.hosts, "threads": 1, "link_ms": on.delay_ms}
    with Runner(lab.command(HEAD, [sys.executable, str(HEAD_RUNNER)]), os.environ | {"HF_HUB_OFFLINE": "1"}) as runner:
        said = runner.ask({"options": options}, _START_S)
        yield Running(runner, {"version": said["version"], "links": "emulated", **said["settings"]})
