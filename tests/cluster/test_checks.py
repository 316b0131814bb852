"""What differs between hosts, lacks, or is too little, is said of each host with the way out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from host_reports import GIB, HASH, MODEL, OTHER_HASH, host

from fullpipe.cluster.checks import Needs, compare, refuse
from fullpipe.cluster.report import Device, HostReport, ModelSeen, Problem
from fullpipe.errors import HostsDiffer

HEAD = host()
ENOUGH = Needs(devices={"alpha": ["cpu"], "beta": ["cpu"]}, memory={"alpha": GIB, "beta": GIB},
               weights={"beta": {MODEL: GIB}})


def beta(**changes: Any) -> HostReport:
    return host("beta", **changes)


def versions(**changes: str | None) -> dict[str, str | None]:
    return HEAD.versions | changes


def test_hosts_alike_have_no_problem() -> None:
    assert compare(HEAD, [beta(), host("gamma")], ENOUGH) == []
    assert compare(HEAD, [], Needs()) == []


@pytest.mark.parametrize(("changes", "what", "way_out", "fact"), [
    ({"versions": versions(fullpipe="0.2.0")}, "it has Fullpipe 0.2.0, and alpha has 0.1.0",
     "`pip install fullpipe==0.1.0`", "fullpipe"),
    ({"code": "ba9876543210"}, "its Fullpipe 0.1.0 has other sources than that of alpha (ba9876543210, 0123456789ab)",
     "the same commit", "fullpipe"),
    ({"versions": versions(python="3.12.1")}, "it has Python 3.12.1, and alpha has 3.11.7", "with Python 3.11.",
     "python"),
    ({"versions": versions(ray="2.50.0")}, "it has Ray 2.50.0, and alpha has 2.60.0", "`pip install ray==2.60.0`",
     "ray"),
    ({"versions": versions(ray=None)}, "it has no Ray, and alpha has 2.60.0", "`pip install ray==2.60.0`", "ray"),
    ({"kernels": None}, "its native kernels are not built", "C compiler", "kernels"),
    ({"devices": [Device("cpu", "x", GIB - 1)]}, "its share takes 1,024 MiB of memory, and 1,024 MiB are free",
     "fewer layers", "memory"),
    ({"models": [ModelSeen(MODEL, "/m", 5, OTHER_HASH)]},
     "its smollm2-135m (/m, sha256 cdcdcdcdcdcd) is not that of alpha (sha256 abababababab)",
     "Remove it there: its part will come from alpha. Or copy /cache/models/smollm2-135m.gguf over it.", MODEL),
    ({"models": [ModelSeen(MODEL)], "free_disk": GIB - 1},
     "1,024 MiB of weights would come from alpha, and its cache folder /cache has room for 1,024 MiB",
     "FULLPIPE_HOME", "disk"),
    ({"reaches": {"alpha": "nothing listens there"}}, "it cannot reach alpha: nothing listens there",
     "alpha's data port through its firewall", "reaches"),
])
def test_a_problem_is_named_with_its_host_and_the_way_out(changes: dict[str, Any], what: str, way_out: str,
                                                          fact: str) -> None:
    problem, = compare(HEAD, [beta(**changes), host("gamma")], ENOUGH)
    assert (problem.host, problem.fact, problem.stops) == ("beta", fact, True)
    assert what in problem.what and way_out in problem.way_out
    with pytest.raises(HostsDiffer):
        refuse([problem])


@pytest.mark.parametrize("changes", [
    {"versions": versions(python="3.11.2")},  # another patch
    {"versions": versions(torch="2.9.1")},
    {"versions": versions(pyzmq="26.0.0")},  # the protocol is the same for years
    {"models": [ModelSeen(MODEL)]},  # it comes from the head
    {"kernels": "avx2"},  # the bits do not depend on the level
    {"reaches": {"alpha": None, "gamma": None}},
    {"reaches": {"delta": "silent"}},  # which takes no part
])
def test_what_does_no_harm_is_no_problem(changes: dict[str, Any]) -> None:
    assert compare(HEAD, [beta(**changes), host("gamma")], ENOUGH) == []


def test_another_torch_is_told_and_stops_nothing() -> None:
    problem, = compare(HEAD, [beta(versions=versions(torch="2.8.0"))], ENOUGH)
    assert not problem.stops and "torch 2.8.0" in problem.what
    assert problem.way_out == "Install the same there: `pip install torch==2.9.0`.", "no index has 2.9.0+cpu"
    refuse([problem])


def test_without_ray_its_versions_do_not_matter() -> None:
    other = beta(versions=versions(ray=None))
    assert compare(HEAD, [other], msgspec.structs.replace(ENOUGH, ray=False)) == []
    problem, = compare(host(versions=versions(ray=None)), [beta()], ENOUGH)
    assert problem.way_out == "Install Ray on alpha."


def test_kernels_are_missed_only_where_they_are_used() -> None:
    assert compare(HEAD, [beta(kernels=None)], msgspec.structs.replace(ENOUGH, kernels=False)) == []


def test_a_device_must_be_there() -> None:
    gpu = Device("cuda:0", "H100", 80 * GIB)
    needs = Needs(devices={"beta": ["cuda:1"]}, memory={"beta": GIB})
    problem, = compare(HEAD, [beta(devices=[Device("cpu", "x", 1), gpu])], needs)
    assert problem.what == "it has no device cuda:1" and "It has cpu, cuda:0" in problem.way_out
    assert compare(HEAD, [beta(devices=[gpu])], Needs(devices={"beta": ["cuda"]}, memory={"beta": 60 * GIB})) == []


def test_stations_of_a_host_share_its_devices() -> None:
    two = [Device("cuda:0", "H100", 2 * GIB), Device("cuda:1", "H100", 2 * GIB), Device("cpu", "x", GIB)]
    needs = Needs(devices={"beta": ["cuda:0", "cuda:1", "cuda:0"]}, memory={"beta": 4 * GIB})
    assert compare(HEAD, [beta(devices=two)], needs) == []
    problem, = compare(HEAD, [beta(devices=two)], msgspec.structs.replace(needs, memory={"beta": 4 * GIB + 1}))
    assert problem.fact == "memory"


def test_the_head_has_all_models_and_what_its_own_share_takes() -> None:
    bare = host(models=[ModelSeen(MODEL)], kernels=None, devices=[Device("cpu", "x", 0)])
    problems = compare(bare, [beta()], ENOUGH)
    assert [one.host for one in problems] == ["alpha"] * 3
    assert [one.fact for one in problems] == ["kernels", "memory", MODEL]
    assert problems[-1].way_out == "Fetch it: `fullpipe pull smollm2-135m`."


def test_what_a_host_found_itself_is_told_once() -> None:
    own = Problem("beta", "FULLPIPE_KERNELS names an unknown level", "Known are.", "kernels")
    damaged = Problem("alpha", "damaged", "Fetch it again.", MODEL)
    found = compare(host(models=[ModelSeen(MODEL)], problems=[damaged]), [beta(kernels=None, problems=[own])], ENOUGH)
    assert found == [damaged, own]


def test_all_that_stops_is_said_at_once() -> None:
    problems = compare(HEAD, [beta(kernels=None, versions=versions(torch="1.0")), host("gamma", code="other")], ENOUGH)
    with pytest.raises(HostsDiffer) as caught:
        refuse(problems)
    error = caught.value
    assert error.message == "beta, gamma cannot take part, and nothing was started"
    assert [host for host, _, _ in error.problems] == ["beta", "gamma"]
    lines = str(error.hint).splitlines()
    assert len(lines) == 2 and lines[0].startswith("beta: its native kernels are not built")
    assert lines[1].startswith("gamma: ") and lines[1].endswith("Install the same commit on both.")
    assert HASH not in str(error)


def test_a_report_travels() -> None:
    sent = beta(reaches={"alpha": None}, problems=[Problem("beta", "x", "y", "z")])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=HostReport) == sent
