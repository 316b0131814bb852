"""A server on three hosts is struck under load, by the lab's trial with few strikes: no token is lost, and in the end
nothing is left on any host."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fullpipe.cluster.netlab import Netlab
from fullpipe.hub import cache
from fullpipe_lab.hosts.ray_nodes import RayNodes
from fullpipe_lab.studies.serving import host_kills

pytestmark = pytest.mark.usefixtures("ray_can_be_started")


LOSES_ITS_AGENT = """
import os, time, psutil
from fullpipe.cluster.contact import RayContact

def net(pid):
    return os.stat(f"/proc/{pid}/ns/net").st_ino

contact = RayContact()
assert len(contact.answering(30.0)) == 2
(agent,) = [one for one in psutil.process_iter()
            if one.name().startswith("ray::Agent") and net(one.pid) == int(os.environ["THERE"])]
agent.kill()
assert len(contact.answering(5.0)) == 1
while len(contact.answering(5.0)) < 2:
    time.sleep(0.1)
contact.close()
print("both answer")
"""


def test_a_host_whose_agent_has_died_is_given_another_one() -> None:
    with Netlab(2) as lab, RayNodes(lab, cpus=1) as nodes:
        there = Path(f"/run/netns/{lab.namespace('h2')}").stat().st_ino
        done = lab.run("h1", [sys.executable, "-c", LOSES_ITS_AGENT], timeout=60, text=True, stdout=subprocess.PIPE,
                       env=nodes.environment("h1") | {"THERE": str(there)})
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "both answer"


@pytest.mark.weights
def test_no_token_is_lost_with_a_station_or_a_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (cache.home() / "models").exists():
        pytest.skip("no models here: `fullpipe pull smollm2-135m`")
    receipt = tmp_path / "receipt.json"
    with pytest.raises(SystemExit) as ended:
        host_kills.main(["--strikes", "2", "--kinds", "kill,host", "--early", "0", "--clients", "2", "--requests", "4",
                         "--ends", "SIGKILL", "--out", str(receipt), "--log", str(tmp_path / "server.log")])
    assert ended.value.code == 0, capsys.readouterr()
    found = json.loads(receipt.read_text())["results"]
    assert found["faults"] == [] and found["struck_requests"] and found["different_or_failed"] == 0
