"""Hosts are surveyed before anything is planned: what lies between them, and what stations cost on each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs

from fullpipe.cluster.agent import Answer, Deafen, DoLook, Listen, Measure, Reach, Request
from fullpipe.cluster.contact import Contact
from fullpipe.cluster.hosts import HostEntry
from fullpipe.cluster.links import Pair
from fullpipe.cluster.profile import Profile
from fullpipe.cluster.report import HostReport, Look
from fullpipe.errors import FullpipeError
from fullpipe.pipeline.keys import RunKeys

_LOOK_S = 60.0  # a model that was never hashed is read whole
_MEASURE_S = 600.0
_REACH_S = 5.0
_QUICK_REACH_S = 1.5


@dataclass(slots=True)
class Known:
    """Is what was found out of the hosts so far; what is known is not measured again.

    entries, reports, processors, profiles: by host; the first as the user had it when the host was looked at. pairs: by
    two hosts' names.
    """

    entries: dict[str, HostEntry] = field(default_factory=dict)
    reports: dict[str, HostReport] = field(default_factory=dict)
    processors: dict[str, str] = field(default_factory=dict)
    profiles: dict[str, Profile] = field(default_factory=dict)
    pairs: dict[tuple[str, str], Pair] = field(default_factory=dict)

    def copy(self) -> Known:
        return Known(dict(self.entries), dict(self.reports), dict(self.processors), dict(self.profiles),
                     dict(self.pairs))

    def forget(self, host: str) -> None:
        """It has gone, and may come back as another one."""
        kept: dict[str, Any]
        for kept in (self.entries, self.reports, self.processors, self.profiles):
            kept.pop(host, None)
        for pair in [pair for pair in self.pairs if host in pair]:
            del self.pairs[pair]


def look_at(contact: Contact, models: Sequence[str], known: Known, *, alone: bool,
            hosts: Sequence[str] | None = None) -> None:
    """Take in the reports of these hosts, looked at once more; None: of all. Raises what a host raises."""
    entries = contact.entries
    head = entries[contact.head].address
    asked: dict[str, Request] = {
        host: DoLook(Look.at(entry, list(models), head=head, alone=alone)) for host, entry in entries.items()
        if hosts is None or host in hosts}
    for host, answer in contact.ask_all(asked, _LOOK_S).items():
        assert answer.report and answer.processor
        known.entries[host], known.reports[host], known.processors[host] = (
            entries[host], answer.report, answer.processor)


def measure_links(contact: Contact, known: Known, *, quick: bool = False, missing: bool = False,
                  deaf: Collection[str] = ()) -> None:
    """Take in what lies between the hosts, both ways. Who cannot reach whom goes into the reports. quick: what is known
    is not measured again, only tried, and with little patience. missing: it is not even tried. deaf: hosts whose port
    is in use by a pipeline that runs: ways to them are taken to be like those from them.

    Raises UsageError for a port that is in use, with the host.
    """
    timeout_s = _QUICK_REACH_S if quick else _REACH_S
    addresses = {host: report.address for host, report in known.reports.items() if report.address}
    due = {(a, b) for a in addresses for b in addresses
           if a != b and b not in deaf and not (missing and (a, b) in known.pairs)}
    keys = RunKeys.new()
    hearing: dict[str, Request] = {host: Listen(address, known.entries[host].port, keys)
                                   for host, address in addresses.items() if any(b == host for _, b in due)}
    try:
        ports = {host: answer.port or 0 for host, answer in contact.ask_all(hearing, timeout_s).items()}
        for pairs in rounds(list(addresses)):
            asked: dict[str, Request] = {a: Reach(b, addresses[b], ports[b], keys, timeout_s,
                                                  quick and (a, b) in known.pairs) for a, b in pairs if (a, b) in due}
            _take(asked, contact.try_all(asked, 4 * timeout_s), known)
    finally:
        contact.try_all(dict.fromkeys(hearing, Deafen(keys.public)), timeout_s)
    for (a, b), pair in list(known.pairs.items()):
        if a in deaf:
            known.pairs.setdefault((b, a), pair)


def _take(asked: Mapping[str, Request], answers: Mapping[str, Answer | FullpipeError], known: Known) -> None:
    for host, request in asked.items():
        assert isinstance(request, Reach)
        answer, reaches = answers[host], dict(known.reports[host].reaches)
        if isinstance(answer, FullpipeError):
            reaches[request.name] = answer.message.removeprefix(f"{host}: ")
        else:
            assert answer.pair
            reaches[request.name] = None
            if not request.quick:
                known.pairs[host, request.name] = answer.pair
        known.reports[host] = structs.replace(known.reports[host], reaches=reaches)


def rounds(hosts: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Ordered pairs of hosts, all of them, so that nobody is in two of a round: they can be measured at once."""
    ring: list[str | None] = [*hosts, *([None] if len(hosts) % 2 else [])]
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = [(a, b) for a, b in zip(ring[:half], reversed(ring[half:])) if a is not None and b is not None]
        yield pairs
        yield [(b, a) for a, b in pairs]
        ring = [ring[0], ring[-1], *ring[1:-1]]


def measure_costs(contact: Contact, known: Known, asked: Callable[[str], Measure],
                  say: Callable[[str], None] = lambda line: None) -> None:
    """Take in what stations cost on every host of which it is not known. Hosts that are parts of one machine are
    measured one after another: they would disturb each other. asked: what a host is asked."""
    waiting = [host for host in known.reports if host not in known.profiles]
    if waiting:
        say(f"measuring what stations cost on {', '.join(waiting)}, unless it is kept there")
    while waiting:
        machines: dict[str, str] = {}
        for host in waiting:
            machines.setdefault(known.processors[host].partition(" ")[0], host)
        for host, answer in contact.ask_all({one: asked(one) for one in machines.values()}, _MEASURE_S).items():
            assert answer.profile
            known.profiles[host] = Profile.model_validate_json(answer.profile)
            waiting.remove(host)


