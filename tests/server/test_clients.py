"""OpenAI's client asks a real server, by the script that `make clients` runs with others; and how outcomes are read."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fullpipe.server.protocol.tables import REFUSED

pytest.importorskip("openai")
CLIENTS = Path(__file__).parent / "clients"
# Beginnings of what cannot work yet, by what is missing.
PENDING = {"tools": "tools" in REFUSED, "structure": "structured_outputs" in REFUSED,
           "completion, echo": "echo" in REFUSED,
           "responses": importlib.util.find_spec("fullpipe.server.responses") is None}


@pytest.fixture(scope="module")
def clients() -> ModuleType:
    """The runner, which is no module of any package."""
    spec = importlib.util.spec_from_file_location("real_clients", CLIENTS / "run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.weights
@pytest.mark.processes
def test_openais_package_sync_and_async(clients: ModuleType, tmp_path: Path) -> None:
    with clients.serving(clients.WITH_TOOLS, tmp_path) as url:
        found = clients.outcomes("openai", Path(sys.executable), url, tmp_path / "openai")
    pending = tuple(begin for begin, missing in PENDING.items() if missing)
    assert len(found) > 10
    assert [one for one in found if one.fault and not one.tried.startswith(pending)] == []


def test_every_client_is_pinned_and_has_its_script(clients: ModuleType) -> None:
    scripts = {path.name for path in CLIENTS.glob("*_client.py")}
    assert {client.script for client in clients.CLIENTS.values()} == scripts
    assert all("==" in need for client in clients.CLIENTS.values() for need in client.needs)
    assert clients.CLIENTS["lm-eval"].packages[0] == "lm-eval"


@pytest.mark.parametrize(("said", "code", "faults"), [
    ('{"tried": "a", "fault": ""}\nnoise\n', 0, []), ('{"tried": "a", "fault": "no"}\n', 1, ["no"]),
    ("", 0, ["it ended with 0"]), ('{"tried": "a", "fault": ""}\n', -9, ["it ended with -9"]),
    ('{"tried": "a", "fault": ""}\n', 1, ["it ended with 1"]),
    ('{"tried": "a", "fault": ""}\n', -1, ["not done after"]),
])
def test_a_script_that_breaks_off_is_a_fault(clients: ModuleType, tmp_path: Path, said: str, code: int,
                                             faults: list[str]) -> None:
    found = [one.fault for one in clients._read("openai", said, code, tmp_path) if one.fault]
    assert len(found) == len(faults) and all(what in one for one, what in zip(found, faults))


def test_a_script_tells_what_it_tried(tmp_path: Path) -> None:
    code = ("from trial import Trials\ntrials = Trials()\nwith trials('a'):\n    pass\nwith trials('b'):\n"
            "    raise ValueError('no\\nway')\ntrials.end()\n")
    done = subprocess.run([sys.executable, "-c", code, "http://x", "m", str(tmp_path)], capture_output=True, text=True,
                          cwd=CLIENTS, check=False)
    assert done.returncode == 1
    assert done.stdout == ('{"tried": "a", "fault": ""}\n{"tried": "b", "fault": "ValueError: no way"}\n')
