"""What hosts report is compared before anything starts: with the head's own report, and with what is needed of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from fullpipe.cluster.report import HostReport, Problem
from fullpipe.errors import HostsDiffer


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """Says what hosts have to give, by their names. A host that is not named gives nothing.

    devices: on what its stations compute. memory: bytes that they take there. weights: bytes of each model that they
    read, which come over the network where a host does not have it. kernels: whether they compute with the native ones.
    ray: whether Ray starts them.
    """

    devices: dict[str, list[str]] = {}
    memory: dict[str, int] = {}
    weights: dict[str, dict[str, int]] = {}
    kernels: bool = True
    ray: bool = True


def compare(head: HostReport, others: Sequence[HostReport], needs: Needs) -> list[Problem]:
    """All that is wrong with any host, head first: what it found itself, then what differs, lacks, or is too little."""
    problems = list(_of_one(head, needs)) + list(_of_head(head, needs))
    for other in others:
        problems += _of_one(other, needs)
        problems += _versions(head, other, needs)
        problems += _models(head, other, needs)
    names = [head.name, *(other.name for other in others)]
    for report in (head, *others):
        problems += _reach(report, names)
    return problems


def refuse(problems: Sequence[Problem]) -> None:
    """Raises HostsDiffer with all problems for which nothing may start, if there are any."""
    if stopping := [problem for problem in problems if problem.stops]:
        raise HostsDiffer([(problem.host, problem.what, problem.way_out) for problem in stopping])


def _of_one(report: HostReport, needs: Needs) -> Iterator[Problem]:
    yield from report.problems
    if needs.kernels and report.kernels is None and not any(one.fact == "kernels" for one in report.problems):
        yield Problem(report.name, "its native kernels are not built, without which quantised weights are widened",
                      "Install a C compiler there and then Fullpipe anew, or compute in bfloat16: `dtype=bfloat16`.",
                      "kernels")
    yield from _devices(report, needs)
    yield from _memory(report, needs)


def _devices(report: HostReport, needs: Needs) -> Iterator[Problem]:
    for name in needs.devices.get(report.name, []):
        if report.device(name) is None:
            yield Problem(report.name, f"it has no device {name}",
                          f"It has {', '.join(one.name for one in report.devices)}; torch must be able to use it.",
                          "devices")


def _memory(report: HostReport, needs: Needs) -> Iterator[Problem]:
    """Stations on one host share it. What a GPU holds takes little of the host's own."""
    needed = needs.memory.get(report.name, 0)
    used = [found for name in needs.devices.get(report.name, []) or ["cpu"] if (found := report.device(name))]
    free = sum(device.free for device in {device.name: device for device in used}.values())
    if used and needed > free:
        yield Problem(report.name, f"its share takes {_mib(needed)} of memory, and {_mib(free)} are free",
                      "End what else runs there, give it fewer layers, or add a host.", "memory")


def _of_head(head: HostReport, needs: Needs) -> Iterator[Problem]:
    """Others may have models from the head, so it has them all."""
    for model in head.models:
        if model.path is None and not any(one.fact == model.name for one in head.problems):
            yield Problem(head.name, f"it does not have {model.name}, which other hosts may need of it",
                          f"Fetch it: `fullpipe pull {model.name}`.", model.name)


def _versions(head: HostReport, other: HostReport, needs: Needs) -> Iterator[Problem]:
    there, here = other.versions, head.versions
    if there.get("fullpipe") != here.get("fullpipe"):
        yield _differs(head, other, "fullpipe", "Fullpipe")
    elif other.code != head.code:
        yield Problem(other.name, f"its Fullpipe {there.get('fullpipe')} has other sources than that of {head.name} "
                      f"({other.code}, {head.code})", "Install the same commit on both.", "fullpipe")
    if (python := _minor(here.get("python"))) != _minor(there.get("python")):
        yield Problem(other.name, f"it has Python {there.get('python')}, and {head.name} has {here.get('python')}",
                      f"Run Fullpipe there with Python {python}.", "python")
    if needs.ray and there.get("ray") != here.get("ray"):
        yield _differs(head, other, "ray", "Ray")
    # Only told: what is new in torch between two versions seldom concerns the few functions that stages use.
    if _minor(there.get("torch")) != _minor(here.get("torch")):
        yield _differs(head, other, "torch", "torch", stops=False)


def _differs(head: HostReport, other: HostReport, package: str, title: str, *, stops: bool = True) -> Problem:
    there, here = other.versions.get(package), head.versions.get(package)
    what = f"it has {f'{title} {there}' if there else f'no {title}'}, and {head.name} has {here or 'none'}"
    way_out = f"Install {title} on {head.name}."
    if here:  # what stands behind a + says for which hardware it was built, and no index has it under that name
        way_out = f"Install the same there: `pip install {package}=={here.partition('+')[0]}`."
    return Problem(other.name, what, way_out, package, stops)


def _models(head: HostReport, other: HostReport, needs: Needs) -> Iterator[Problem]:
    """A model that a host does not have comes from the head; one that is another than the head's may not be used."""
    wanted, fetched = needs.weights.get(other.name, {}), 0
    for seen in other.models:
        ours = head.model(seen.name)
        if seen.path is None:
            fetched += wanted.get(seen.name, 0)
        elif ours.sha256 is not None and seen.sha256 != ours.sha256:
            yield Problem(other.name, f"its {seen.name} ({seen.path}, {_short(seen.sha256)}) is not that of "
                          f"{head.name} ({_short(ours.sha256)})",
                          f"Remove it there: its part will come from {head.name}. Or copy {ours.path} over it.",
                          seen.name)
    if fetched > other.free_disk:
        yield Problem(other.name, f"{_mib(fetched)} of weights would come from {head.name}, and its cache folder "
                      f"{other.cache} has room for {_mib(other.free_disk)}",
                      "Free some space there, or set FULLPIPE_HOME there to a folder on a larger disk.", "disk")


def _reach(report: HostReport, names: Sequence[str]) -> Iterator[Problem]:
    for name in names:
        if reason := report.reaches.get(name):
            yield Problem(report.name, f"it cannot reach {name}: {reason}",
                          f"Let {name}'s data port through its firewall, or give it another address (`host_ip`, "
                          "`interface`) or another data port.", "reaches")


def _minor(version: str | None) -> str | None:
    """ "3.11" of "3.11.7"."""
    return ".".join(version.split(".")[:2]) if version else None


def _short(sha256: str | None) -> str:
    return f"sha256 {sha256[:12]}" if sha256 else "unread"


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.0f} MiB"
