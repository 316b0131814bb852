"""Ray runs on the hosts of a lab, and leaves nothing there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fullpipe.cluster.netlab import Netlab
from fullpipe.hub import cache
from fullpipe_lab.hosts.ray_nodes import RayNodes

pytestmark = pytest.mark.usefixtures("ray_can_be_started")

DRIVER = """
import json, os, sys
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever Ray has to say goes there
import ray
ray.init(log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1)
def look():
    import fullpipe
    home = os.environ["FULLPIPE_HOME"]
    return [home, sorted(os.listdir(home)), fullpipe.__file__]

nodes = {node["NodeManagerAddress"]: [node["Alive"], node["Resources"].get("CPU")] for node in ray.nodes()}
seen = {address: ray.get(look.options(resources={f"node:{address}": 0.001}).remote(), timeout=20)
        for address in sys.argv[1:]}
print(json.dumps([nodes, seen]), file=answer, flush=True)
"""


@pytest.fixture(scope="module")
def nodes(ray_can_be_started: None) -> Iterator[RayNodes]:
    """Three of them; nothing of theirs is left when they end."""
    with Netlab(3) as lab:
        with RayNodes(lab, models=["h1"], cpus=3) as ray_nodes:
            yield ray_nodes
        assert [lab.pids(name) for name in lab.names] == [[], [], []]
        assert not ray_nodes.folder.exists()


def look(nodes: RayNodes, *hosts: str) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Which nodes there are, alive and with how many CPUs, and what tasks on these hosts see."""
    done = nodes.lab.run("h1", [sys.executable, "-c", DRIVER, *map(nodes.lab.address, hosts)], capture_output=True,
                         text=True, env=nodes.environment("h1"))
    assert done.returncode == 0, done.stderr
    there, seen = json.loads(done.stdout)
    return there, seen


def test_each_host_is_a_node_with_a_cache_of_its_own(nodes: RayNodes) -> None:
    import fullpipe

    there, seen = look(nodes, "h1", "h2", "h3")
    assert there == {nodes.lab.address(name): [True, 3.0] for name in ("h1", "h2", "h3")}
    for name in ("h1", "h2", "h3"):
        home, files, source = seen[nodes.lab.address(name)]
        assert Path(home) == nodes.home(name)
        assert files == (["models"] if name == "h1" and (cache.home() / "models").exists() else [])
        assert source == fullpipe.__file__


def test_nobody_enters_without_the_token(nodes: RayNodes) -> None:
    wrong = {**nodes.environment("h2"), "RAY_AUTH_TOKEN": "0" * 64,
             "RAY_NUM_REDIS_GET_RETRIES": "1"}  # a second each, 20 if one does not say so
    done = nodes.lab.run("h2", [sys.executable, "-c", "import ray; ray.init()"], capture_output=True, text=True,
                         env=wrong)
    assert done.returncode
    assert "AuthenticationError" in done.stderr


def test_a_host_that_was_lost_joins_again(nodes: RayNodes) -> None:
    nodes.lab.kill("h3")
    nodes.start("h3")
    there, _ = look(nodes, "h3")
    assert there[nodes.lab.address("h3")] == [True, 3.0]


def test_a_node_that_cannot_start_tells_why_and_leaves_nothing(nodes: RayNodes) -> None:
    wrong = RayNodes(nodes.lab, names=["h2"], cpus=-1)
    with pytest.raises(RuntimeError, match="Ray's node on h2 ended"):
        wrong.__enter__()
    assert not wrong.folder.exists()
