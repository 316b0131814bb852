"""What users of several hosts suffer: each wrong input is told with its host and the way out before anything is loaded,
and however a command ends, nothing is left on any host."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fullpipe.cluster.netlab import Netlab, Shape
from fullpipe.hub import CATALOGUE, cache
from fullpipe_lab.hosts.ray_nodes import RayNodes

pytestmark = [pytest.mark.usefixtures("ray_can_be_started"), pytest.mark.timeout(180)]

MODEL = "smollm2-135m"
HERE = Path(__file__).parent
TAKEN, TAKEN_BY_HEAD, SERVED = 5999, 5998, 5997  # ports
GENERATE = ("generate", "def f(x):", "--no-chat-template", "--model", MODEL, "--draft", "ngram", "--max-tokens", "8")
LONG = ("generate", "def f(x):", "--no-chat-template", "--model", MODEL, "--max-tokens", "4000", "--ignore-eos",
        "--hosts", "ray", "--stages", "2", "--kv-pool-mib", "16")
GONE_S = 10.0
RAY = "{h1}:6379"
ROOM_MIB = 8
LISTENER = """
import socket, sys
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
print(flush=True)
server.accept()
"""

ASK = """
import json, sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {"Content-Type": "application/json"})
print(json.load(urllib.request.urlopen(request, timeout=30))["choices"][0]["text"])
"""

# What is asked for: lines of each host in the hosts file ({h3} is an address), options, and the exit code, what the
# error says, and what the hint does.
BAD: dict[str, tuple[dict[str, str], tuple[str, ...], int, str, str]] = {
    "an interface that is not there": (
        {"h1": "", "h2": 'interface = "eth9"'}, (), 7, "h2: this machine has no interface eth9.", "eth0: {h2}"),
    "an interface of the head that is not there": (
        {"h1": "", "h2": ""}, ("--interface", "eth9"), 7, "h1: this machine has no interface eth9.", "eth0: {h1}"),
    "an address of another host": (
        {"h1": "", "h2": 'host_ip = "{h3}"'}, (), 7, "h2: {h3} is no address of this machine.", "eth0: {h2}"),
    "two addresses": (
        {"h1": "", "h2": 'interface = "lo"\nhost_ip = "{h2}"'}, (), 7, "are two addresses, and one is meant",
        "Leave one of them out"),
    "an address within a host": (
        {"h1": "", "h2": 'host_ip = "127.0.0.1"'}, (), 7, "h2: the other hosts cannot reach this machine at 127.0.0.1",
        "Choose an address on their network"),
    "a port in use": (
        {"h1": "", "h2": f"port = {TAKEN}"}, (), 2, f"h2: port {TAKEN} of {{h2}} is in use", "End what listens there"),
    "a port of the head in use": (
        {"h1": "", "h2": ""}, ("--data-port", str(TAKEN_BY_HEAD)), 2, f"h1: port {TAKEN_BY_HEAD} of {{h1}} is in use",
        "End what listens there"),
    "a host that Ray does not have": (
        {"h1": "", "h4": ""}, ("--ray-address", RAY), 2, "Ray has no host at the address of h4 ({h4})",
        "ray start --address="),
    "a head that is none of the hosts": (
        {"h2": ""}, ("--ray-address", RAY), 2, "this machine is none of the hosts", "Run it on one of them"),
    "more stages than hosts": (
        {"h1": "", "h2": ""}, ("--stages", "3"), 2, "3 stages are asked for, and there are 2 hosts",
        "ask for fewer stages"),
    "no stage": ({"h1": "", "h2": ""}, ("--stages", "0"), 2, "0 stages are asked for", "planner says how many"),
    "more stages than memory allows": (
        {"h1": "", "h2": "memory_mib = 1"}, ("--stages", "2"), 2, "2 stages have no room on these hosts", "h2 0.00"),
    "less memory than the model takes": (
        {"h1": "memory_mib = 20", "h2": "memory_mib = 20"}, (), 2, "no memory for the model together", "h2 0.02"),
    "a host without the model and without room for it": (
        {"h1": "", "h3": ""}, ("--stages", "2"), 7, "of weights would come from h1", "set FULLPIPE_HOME there"),
    "a host with another version": (
        {"h1": "", "odd": ""}, (), 7, "odd: it has Fullpipe 9.9.9, and h1 has", "pip install fullpipe=="),
    "a plan for hosts that are not there": (
        {"h1": "", "h2": ""}, ("--plan", "{folder}/strange.toml"), 2, "names a host that is not there: elsewhere",
        "There are h1, h2."),
    "a plan for another model": (
        {"h1": "", "h2": ""}, ("--plan", "{folder}/other.toml"), 2, "is for gpt2, not smollm2-135m", "fullpipe plan"),
    "what the plan says already": (
        {"h1": "", "h2": ""}, ("--plan", "{folder}/made.toml", "--stages", "2"), 2, "says what --stages 2 does",
        "edit the plan"),
    "a Ray that is not there": (
        {}, ("--hosts", "ray", "--ray-address", "{h1}:1"), 2, "no Ray answers at {h1}:1: Connection refused",
        "ray start --head"),
}
STRANGE_PLAN = """model = "{}"
draft = "none"
[[stage]]
host = "h1"
first = 0
last = 15
[[stage]]
host = "elsewhere"
first = 15
last = 30
"""


@pytest.fixture(scope="module")
def nodes(ray_can_be_started: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    if CATALOGUE and not (cache.home() / "models").exists():
        pytest.skip(f"no models here: fullpipe pull {MODEL}")
    with Netlab(3, second=["h1", "h2"]) as lab, RayNodes(lab, names=["h1", "h2"], models=["h1"], cpus=2) as made:
        yield made


@pytest.fixture(scope="module")
def little_room(nodes: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on a disk that is nearly full."""
    room = tmp_path_factory.mktemp("room")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM_MIB}m", "none", str(room)], check=True)
    yield room
    subprocess.run(["umount", "-l", str(room)], check=True)


@pytest.fixture(scope="module")
def words(nodes: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands for names in braces."""
    net = nodes.lab.address("h1").rpartition(".")[0]
    return {f"h{number}": f"{net}.{number}" for number in range(1, 5)} | {
        "odd": nodes.lab.address("h2"), "folder": str(tmp_path_factory.mktemp("files"))}


def prefixes(nodes: RayNodes, little_room: Path, other_version: Path) -> dict[str, list[str]]:
    """How agents come to hosts without Ray: h2, h3 with little room, and h2 once more as one that is odd."""
    lab, home = nodes.lab, cache.HOME_VARIABLE
    path = os.pathsep.join([str(other_version), nodes.environment("h2")["PYTHONPATH"]])
    return {"h2": lab.command("h2", ["env", f"{home}={nodes.home('h2')}"]),
            "h3": lab.command("h3", ["env", f"{home}={little_room}"]),
            "odd": lab.command("h2", ["env", f"{home}={nodes.home('h2')}", f"PYTHONPATH={path}"])}


def another_version(folder: Path) -> Path:
    """What `pip` leaves of one, for the same sources."""
    told = folder / "fullpipe-9.9.9.dist-info" / "METADATA"
    told.parent.mkdir(parents=True)
    told.write_text("Metadata-Version: 2.1\nName: fullpipe\nVersion: 9.9.9\n")
    return folder


@pytest.fixture(scope="module")
def answers(nodes: RayNodes, words: dict[str, str], little_room: Path) -> dict[str, dict[str, Any]]:
    """What the command line says to all cases."""
    folder = Path(words["folder"])
    (folder / "strange.toml").write_text(STRANGE_PLAN.format(MODEL))
    (folder / "other.toml").write_text(STRANGE_PLAN.format("gpt2"))
    good = hosts_file({"h1": "", "h2": ""}, words, folder / "good.toml")
    apart = hosts_file(dict.fromkeys(("h1", "h2"), 'interface = "eth1"'), words, folder / "apart.toml")
    asked = {"alone": [*GENERATE],
             "plan": ["plan", "--model", MODEL, "--draft", "ngram", "--hosts", apart, "--order", "h1,h2", "--json",
                      "--write", str(folder / "made.toml")],
             "planned": [*GENERATE, "--hosts", good, "--plan", str(folder / "made.toml")]}
    for number, (name, (lines, options, *_)) in enumerate(BAD.items()):
        hosts = ["--hosts", hosts_file(lines, words, folder / f"{number}.toml")] if lines else []
        asked[name] = [*GENERATE, *hosts, *(option.format(**words) for option in options)]
    listeners = [listener(nodes.lab, host, port) for host, port in (("h2", TAKEN), ("h1", TAKEN_BY_HEAD))]
    given = {"commands": asked, "addresses": {name: words[name] for name in ("h1", "h2", "h3", "odd")},
             "prefixes": prefixes(nodes, little_room, another_version(folder / "other"))}
    try:
        done = nodes.lab.run("h1", [sys.executable, str(HERE / "command_cases.py"), json.dumps(given)],
                             env=nodes.environment("h1"), capture_output=True, text=True)
    finally:
        for one in listeners:
            with one:
                one.kill()
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def hosts_file(lines: dict[str, str], words: dict[str, str], path: Path) -> str:
    path.write_text("".join(f'[[host]]\nname = "{name}"\naddress = "{words[name]}"\n{more.format(**words)}\n'
                            for name, more in lines.items()))
    return str(path)


def listener(lab: Netlab, host: str, port: int) -> subprocess.Popen[str]:
    process = lab.popen(host, [sys.executable, "-c", LISTENER, lab.address(host), str(port)], text=True,
                        stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline()
    return process


# ---- what is asked for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_told_with_its_host_and_the_way_out(answers: dict[str, dict[str, Any]], words: dict[str, str],
                                                           name: str) -> None:
    _, _, code, error, hint = BAD[name]
    found = answers[name]
    _, _, told = found["err"].rpartition("error: ")
    assert error.format(**words) in told and hint.format(**words) in told, found["err"]
    assert found["code"] == code and not found["out"] and "plan:" not in found["err"]
    assert found["seconds"] < 30


def test_two_hosts_say_what_one_says_though_one_has_no_model(answers: dict[str, dict[str, Any]]) -> None:
    alone, planned = answers["alone"], answers["planned"]
    assert alone["code"] == planned["code"] == 0, planned["err"]
    assert planned["out"] == alone["out"] and alone["out"].strip()
    assert "on h2 gets smollm2-135m" in planned["err"]


def test_a_plan_says_what_is_where_and_what_it_promises(answers: dict[str, dict[str, Any]]) -> None:
    assert answers["plan"]["code"] == 0, answers["plan"]["err"]
    found = json.loads(answers["plan"]["out"])
    assert found["best"]["hosts"] == ["h1", "h2"] and sum(found["best"]["layers"]) == 30
    layers = found["best"]["layers"]
    assert f"plan: h1 layers 0 to {layers[0] - 1}, h2 " in answers["planned"]["err"], "the file is kept to"
    assert found["plan"]["promise"]["plan_ms"] == found["best"]["ms_per_token"] > 0


def test_of_several_addresses_the_one_that_was_named_is_used(answers: dict[str, dict[str, Any]],
                                                             nodes: RayNodes) -> None:
    told = answers["plan"]["err"]
    for host in ("h1", "h2"):
        assert nodes.lab.second_address(host) in told and nodes.lab.address(host) not in told


# ---- how it ends -------------------------------------------------------------------------------------------------


class Running:
    """A command on the first host, in a process of its own; others are those who were there before."""

    def __init__(self, nodes: RayNodes, *arguments: str, **environment: str) -> None:
        self.nodes = nodes
        self.before = self._there()
        self.process = nodes.lab.popen(
            "h1", [sys.executable, "-m", "fullpipe", *arguments], env=nodes.environment("h1") | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        self.said: list[str] = []
        self._news: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                self._news.put(line)
        self._news.put(None)

    def until(self, words: str) -> None:
        while (line := self._news.get(timeout=60)) is not None:
            self.said.append(line)
            if words in line:
                return
        raise AssertionError(f"it has ended: {''.join(self.said)}")

    def rest(self) -> None:
        while (line := self._news.get(timeout=60)) is not None:
            self.said.append(line)

    def fetched(self) -> int:
        """MiB of weights that a station had from the head when that was told last."""
        told = re.findall(r"from here: (\d+) of \d+ MiB", "".join(self.said))
        return int(told[-1]) if told else 0

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        code = self.process.wait(GONE_S)
        self._reader.join(GONE_S)
        return code

    def left(self) -> dict[str, str]:
        """Processes on any host that were not there before, by host and number."""
        return {one: told for one, told in self._there().items() if one not in self.before}

    def _there(self) -> dict[str, str]:
        return {f"{host} {pid}": _told(pid) for host in self.nodes.lab.names for pid in self.nodes.lab.pids(host)}

    def nobody_left(self) -> bool:
        deadline = time.monotonic() + GONE_S
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
        return True

    def ours(self, host: str) -> list[psutil.Process]:
        """Processes of Fullpipe there; Ray's own, which have ours as children, are left out."""
        return [psutil.Process(int(one.split()[1])) for one, told in self.left().items()
                if one.startswith(f"{host} ") and "fullpipe" in told and "ray::" not in told]


def _told(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@pytest.mark.parametrize(("moment", "number", "code"), [
    ("measuring", signal.SIGINT, 130), ("predicted", signal.SIGTERM, 143), ("x", signal.SIGINT, 130)])
def test_a_signal_ends_it_everywhere_at_any_moment(nodes: RayNodes, answers: dict[str, Any], moment: str,
                                                   number: signal.Signals, code: int) -> None:
    running = Running(nodes, *LONG)
    running.until(moment)
    assert running.end(number) == code, running.said
    assert running.nobody_left()


def test_weights_come_over_a_link_that_breaks_and_what_has_come_is_not_sent_again(
        nodes: RayNodes, answers: dict[str, Any], words: dict[str, str]) -> None:
    folder, lab = Path(words["folder"]), nodes.lab
    planned = [*GENERATE, "--hosts", str(folder / "good.toml"), "--plan", str(folder / "made.toml"),
               "--host-timeout", "10"]  # TCP tries again ever later, and so long after the link is back
    shutil.rmtree(nodes.home("h2") / "from-head")
    before = lab.shape("h1", "h2")
    lab.set("h1", "h2", Shape(mbit=40))
    try:
        interrupted = Running(nodes, *planned)
        while not interrupted.fetched():
            interrupted.until("from here: ")
        assert interrupted.end(signal.SIGINT) == 130 and interrupted.nobody_left()
        again = Running(nodes, *planned)
        again.until("from here: ")
        assert again.fetched() >= interrupted.fetched()
        lab.cut("h1", "h2")
        time.sleep(2.0)
        lab.heal("h1", "h2")
        code = again.process.wait(60)
    finally:
        lab.heal("h1", "h2")
        lab.set("h1", "h2", before)
    again.rest()
    assert code == 0, "".join(again.said)
    assert answers["alone"]["out"].strip() in "".join(again.said)


def test_a_server_idles_answers_and_leaves_nothing_when_it_is_killed(nodes: RayNodes,
                                                                     answers: dict[str, Any]) -> None:
    running = Running(nodes, "serve", "--model", MODEL, "--hosts", "ray", "--stages", "2", "--host-timeout", "1",
                      "--port", str(SERVED), OMP_NUM_THREADS="7", ONLY_ON_THE_HEAD="1")
    running.until("http://")
    _finds_its_own_environment(running)
    assert _busy(running, 3.0) < 0.04
    assert _asked(nodes), "it is still there after being idle"
    assert running.end(signal.SIGKILL) == -signal.SIGKILL
    assert running.nobody_left()


def _finds_its_own_environment(running: Running) -> None:
    """A host does not see what is set on the head alone, nor need it."""
    for host in ("h2", "h3"):
        for process in running.ours(host):
            there = process.environ()
            assert there[cache.HOME_VARIABLE] == running.nodes.environment(host)[cache.HOME_VARIABLE]
            assert "ONLY_ON_THE_HEAD" not in there and there["OMP_NUM_THREADS"] != "7"
    assert running.ours("h2") or running.ours("h3")


def _busy(running: Running, seconds: float) -> float:
    """By how much all processes of ours on all hosts keep a core busy."""
    ours = [process for host in running.nodes.lab.names for process in running.ours(host)]
    before = [sum(process.cpu_times()[:2]) for process in ours]
    time.sleep(seconds)
    return sum(sum(process.cpu_times()[:2]) - then for process, then in zip(ours, before)) / seconds


def _asked(nodes: RayNodes) -> str:
    """What the server answers to somebody on its host."""
    asked = json.dumps({"model": MODEL, "prompt": "def f(x):", "max_tokens": 4})
    done = nodes.lab.run("h1", [sys.executable, "-c", ASK, f"http://127.0.0.1:{SERVED}/v1/completions", asked],
                         capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_a_host_that_cannot_be_reached_is_named_within_the_start_timeout(nodes: RayNodes, words: dict[str, str],
                                                                         answers: dict[str, Any]) -> None:
    nodes.lab.cut("h1", "h2")
    try:
        begun = time.monotonic()
        done = nodes.lab.run("h1", [sys.executable, "-m", "fullpipe", *GENERATE, "--start-timeout", "3", "--hosts",
                                    str(Path(words["folder"]) / "good.toml")],
                             env=nodes.environment("h1"), capture_output=True, text=True)
        assert time.monotonic() - begun < 30
    finally:
        nodes.lab.heal("h1", "h2")
    assert done.returncode == 7
    assert "error: h2 has not answered within 3 s" in done.stderr and "can be reached" in done.stderr
