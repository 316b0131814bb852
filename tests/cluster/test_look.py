"""A host looks at itself. Here it is this machine, with a cache folder of its own."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fullpipe import hub, kernels, threads
from fullpipe.cluster import look as looking
from fullpipe.cluster.addresses import own_addresses
from fullpipe.cluster.gpus import seen_by_torch
from fullpipe.cluster.hosts import HostEntry
from fullpipe.cluster.look import code_of, look
from fullpipe.cluster.report import Device, HostReport, Look
from fullpipe.errors import UsageError
from fullpipe.hub.catalogue import CatalogueModel, Part

CONTENT = b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(1000)  # no tensors, and nothing said
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("FULLPIPE_HOME", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    part = Part("tiny", "1.0", "tiny.bin", len(CONTENT), SHA256)
    monkeypatch.setitem(hub.CATALOGUE, "tiny", CatalogueModel("tiny", "Tiny", "MIT", "ngram", SHA256, (part,)))
    return folder


def at(name: str = "alpha", *models: str, **said: Any) -> HostReport:
    return look(Look(name=name, models=list(models), alone=True, **said))


def keep(home: Path, content: bytes = CONTENT) -> Path:
    file = home / "models" / "tiny.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    return file


def test_a_host_tells_what_it_is() -> None:
    found = at()
    assert found.name == "alpha" and found.problems == [] and found.reaches == {}
    assert found.address == "127.0.0.1" and found.addresses == own_addresses()
    assert found.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found.versions["torch"] and found.versions["pyzmq"] and "ray" in found.versions
    native = kernels.load()
    assert found.kernels == (native.level if native else None)
    assert found.cores == threads.cores() and found.processor
    assert found.device("cpu") == Device("cpu", found.processor, found.free_memory)
    assert found.free_memory > 1 << 20 and found.free_disk > 1 << 20


def test_a_model_in_the_cache_is_told_with_its_hash(home: Path) -> None:
    file = keep(home)
    model = at("alpha", "tiny").model("tiny")
    assert (model.path, model.size, model.sha256) == (str(file), len(CONTENT), SHA256)


def test_a_model_that_is_not_there_is_no_problem_and_is_not_fetched(home: Path) -> None:
    names = ("tiny", "/no/such.gguf", "org/none", "nonsense")
    found = at("alpha", *names)
    assert [(one.name, one.path) for one in found.models] == [(name, None) for name in names]
    assert found.problems == [] and not (home / "models").exists()


def test_the_same_file_has_the_same_hash_under_any_name(home: Path, tmp_path: Path) -> None:
    keep(home)
    other = tmp_path / "other.gguf"
    other.write_bytes(CONTENT)
    assert [one.sha256 for one in at("alpha", "tiny", str(other)).models] == [SHA256, SHA256]


def test_an_altered_model_is_a_problem_of_its_host(home: Path) -> None:
    keep(home, CONTENT + b"x")
    found = at("alpha", "tiny")
    problem, = found.problems
    assert (problem.host, problem.fact) == ("alpha", "tiny") and "was altered" in problem.what and problem.way_out
    assert found.model("tiny").path is None


def test_what_the_user_gives_of_a_host_bounds_it() -> None:
    found = at(cores=1, memory_mib=1)
    assert found.cores == 1 and found.free_memory == 1 << 20 and found.devices[0].free == 1 << 20


def test_more_cores_than_there_are_is_a_problem() -> None:
    found = at(cores=100_000)
    problem, = found.problems
    assert problem.what == f"100000 cores are asked of it, and it has {threads.cores()} to give"
    assert found.cores == threads.cores() and problem.fact == "cores"


def test_an_address_that_cannot_be_is_a_problem_with_its_way_out() -> None:
    found = look(Look(name="beta", head="127.0.0.1"))
    problem, = found.problems
    assert problem.fact == "address" and "cannot reach this machine at 127.0.0.1" in problem.what
    assert "`host_ip`" in problem.way_out and found.address is None
    found = look(Look(name="beta", interface="eth77", alone=True))
    assert found.problems[0].what == "this machine has no interface eth77"


def test_kernels_that_cannot_be_had_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UsageError("FULLPIPE_KERNELS asks for avx9", hint="It has: portable.")

    monkeypatch.setattr(looking.kernels, "load", refuse)
    found = at()
    assert found.kernels is None and found.problems[0].what == "FULLPIPE_KERNELS asks for avx9"


def test_an_entry_of_a_hosts_file_says_what_is_asked() -> None:
    entry = HostEntry(name="beta", address="10.0.0.2", interface="eth1", host_ip="10.0.0.2", cores=2, memory_mib=5)
    assert Look.at(entry, ["m"], head="10.0.0.1") == Look(
        name="beta", models=["m"], head="10.0.0.1", interface="eth1", host_ip="10.0.0.2", cores=2, memory_mib=5)


def test_a_look_takes_less_than_a_second_and_loads_no_torch(home: Path) -> None:
    keep(home)
    code = ("import sys, time; begun = time.perf_counter(); from fullpipe.cluster.look import look; "
            "from fullpipe.cluster.report import Look; look(Look(name='a', models=['smollm2-135m'], alone=True)); "
            "print(time.perf_counter() - begun, 'torch' in sys.modules)")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(told[0]) < 1 and told[1] == "False"
    begun = time.perf_counter()
    at("alpha", "tiny", "tiny")
    assert time.perf_counter() - begun < 1


def test_the_code_of_a_package_changes_with_its_sources(tmp_path: Path) -> None:
    def package(name: str, **files: str) -> Path:
        (tmp_path / name / "inner").mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / name / "inner" / f"{file}.py").write_text(text)
        return tmp_path / name

    first, same, other = package("a", x="1", y="2"), package("b", x="1", y="2"), package("c", x="1", y="3")
    moved = package("d", x="12", y="")
    assert code_of(first) == code_of(same)
    assert len({code_of(one) for one in (first, other, moved)}) == 3


# ---- GPUs ------------------------------------------------------------------------------------------------------------

TOLD = "0, GPU-aa11, NVIDIA H100, 81000\n1, GPU-bb22, NVIDIA A10, 24000\nNo more\n2, GPU-cc33, Odd, [N/A]\n"


@pytest.mark.parametrize(("visible", "titles"), [
    (None, ["NVIDIA H100", "NVIDIA A10"]), ("", []), ("1", ["NVIDIA A10"]), ("1, 0", ["NVIDIA A10", "NVIDIA H100"]),
    ("GPU-bb", ["NVIDIA A10"]), ("0,7,1", ["NVIDIA H100"]), ("-1", []),
])
def test_gpus_are_called_as_torch_calls_them(visible: str | None, titles: list[str]) -> None:
    found = seen_by_torch(TOLD, visible)
    assert [one.title for one in found] == titles
    assert [one.name for one in found] == [f"cuda:{number}" for number in range(len(titles))]
    assert all(one.free in (81000 << 20, 24000 << 20) for one in found)
