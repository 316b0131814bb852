"""The command line answers many times in one process, which runs on the first host: `python command_cases.py CASES`.

CASES is a JSON object. commands: names, and the arguments of each. prefixes: by host the command that runs another one
there. addresses: by host. Printed is another object: exit code, seconds, standard output and error of each command.

Torch is imported once, and hosts have one agent for all commands, which is no actor of Ray: to have those made for each
of them would take longer than all that they do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from fullpipe.assembly import hosts
from fullpipe.cluster.contact import CommandContact
from fullpipe.cluster.hosts import HostEntry, read_hosts
from fullpipe.options import PipelineOptions


class Kept(CommandContact):
    """Stays open, and has at any time the hosts that a hosts file names."""

    def asked(self, asked: PipelineOptions) -> Kept:
        """In place of `contact_of`."""
        assert asked.hosts
        self.entries = {entry.name: entry for entry in read_hosts(Path(asked.hosts))}
        self.entries[self.head] = self.entries[self.head].model_copy(update=hosts.said_of_head(asked))
        return self

    def refresh(self) -> None:
        if not self._agents:
            super().refresh()

    def close(self) -> None:
        """Others come after."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library has to say goes there
    given = json.loads(sys.argv[1])
    entries = [HostEntry(name=name, address=address) for name, address in given["addresses"].items()]
    contact = Kept(entries[0].name, entries, given["prefixes"])
    by_ray = hosts.contact_of
    hosts.contact_of = lambda asked: by_ray(asked) if asked.ray_address else contact.asked(asked)
    print(json.dumps({name: answered(words) for name, words in given["commands"].items()}), file=answers)


def answered(words: Sequence[str]) -> dict[str, Any]:
    from fullpipe.cli.main import app

    begun = time.monotonic()
    result = CliRunner().invoke(app, list(words))
    return {"code": result.exit_code, "seconds": time.monotonic() - begun, "out": result.stdout, "err": result.stderr}


if __name__ == "__main__":
    main()
