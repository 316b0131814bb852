"""A host reports what it is and has, before anything is loaded. Plain data: it travels from host to head."""

from __future__ import annotations

from typing import Self

import msgspec

from fullpipe.cluster.hosts import HostEntry


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """Is what the head asks of a host.

    name: what the host is called. models: names of models, as `hub.resolve` takes them. head: an address of the head
    (for the head its own); None: there is none. alone: no other host takes part. The rest is what the user said of the
    host; see `cluster/hosts.py`.
    """

    name: str
    models: list[str] = []
    head: str | None = None
    alone: bool = False
    interface: str | None = None
    host_ip: str | None = None
    cores: int | None = None
    memory_mib: int | None = None

    @classmethod
    def at(cls, entry: HostEntry, models: list[str], *, head: str | None, alone: bool = False) -> Self:
        """What is asked of a host that the hosts file has."""
        return cls(name=entry.name, models=models, head=head, alone=alone, interface=entry.interface,
                   host_ip=entry.host_ip, cores=entry.cores, memory_mib=entry.memory_mib)


class Problem(msgspec.Struct, frozen=True):
    """Is a reason why a host cannot take part as asked.

    what: without the host's name. way_out: a sentence. fact: the column of the table of hosts that shows it. stops:
    whether nothing may start; else it is told only.
    """

    host: str
    what: str
    way_out: str
    fact: str
    stops: bool = True


class Device(msgspec.Struct, frozen=True):
    """Is what stages may compute on. name: "cpu", "cuda:0". free: bytes of its memory."""

    name: str
    title: str
    free: int


class ModelSeen(msgspec.Struct, frozen=True):
    """Says whether a host has a model. path: None where it does not. size: bytes of all its files. sha256: the same on
    two hosts that have the same files."""

    name: str
    path: str | None = None
    size: int = 0
    sha256: str | None = None


class HostReport(msgspec.Struct, frozen=True, kw_only=True):
    """Is what a host says of itself.

    address: at which the others find it; None where that could not be said. addresses: all of it, by interface.
    versions: of what must fit together; None for what is not installed. code: the same for the same sources of
    Fullpipe, whose version need not tell. kernels: level of instructions of the native ones; None where there are none.
    cores, free_memory: what may be taken, the latter in bytes. free_disk: bytes, where models are kept, which is
    `cache`. problems: what it found itself. reaches: the other hosts by name, and why their data ports cannot be
    reached from here; None where they can. Whoever tries fills it in.
    """

    name: str
    address: str | None
    addresses: dict[str, list[str]]
    versions: dict[str, str | None]
    code: str
    processor: str
    kernels: str | None
    cores: int
    devices: list[Device]
    free_memory: int
    free_disk: int
    cache: str
    models: list[ModelSeen]
    problems: list[Problem] = []
    reaches: dict[str, str | None] = {}

    def model(self, name: str) -> ModelSeen:
        """Of a model that was asked for."""
        return next(one for one in self.models if one.name == name)

    def device(self, name: str) -> Device | None:
        """None where there is none of this name. "cuda" is the first GPU."""
        return next((one for one in self.devices if one.name == ("cuda:0" if name == "cuda" else name)), None)
