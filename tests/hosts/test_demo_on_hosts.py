"""`fullpipe demo` on hosts: real links between them, a head that is one of them, and nothing of it afterwards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fullpipe.cluster import netlab_hosts

_DEMO = [sys.executable, "-m", "fullpipe", "demo", "hello there", "--namespaces", "--model", "smollm2-135m", "--draft",
         "ngram", "--stages", "2", "--link-ms", "5", "--max-tokens", "12", "--picture"]


def test_the_demo_runs_on_hosts_and_says_what_was_measured(hosts_can_be_made: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = subprocess.run([*_DEMO, tmp_path / "both.svg"], capture_output=True, text=True, timeout=120,
                          env=_environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "text identical: yes" in done.stdout and (tmp_path / "both.svg").exists()
    assert "smollm2-135m on 2 hosts of this machine: network namespaces, 5 ms apart" in done.stderr
    told = re.findall(r"^(h\d) \(10\.77\.\d+\.\d+\): (.+)$", done.stderr, re.MULTILINE)
    assert [name for name, _ in told] == ["h1", "h2"]
    assert {part for _, parts in told for part in parts.split(", ")} == {"stage 0", "stage 1", "draft"}
    found = re.search(r"between them: links of ([\d.]+) to ([\d.]+) ms", done.stderr)
    assert found and 5 <= float(found[1]) <= float(found[2]) < 50
    assert not _left(tmp_path)


def test_ctrl_c_ends_it_on_every_host(hosts_can_be_made: None, tmp_path: Path) -> None:
    running = subprocess.Popen([*_DEMO, tmp_path / "both.svg"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, env=_environment(tmp_path), start_new_session=True)
    try:
        assert running.stderr
        while "--- plain pipeline" not in (line := running.stderr.readline()):
            assert line, "it has ended"
        assert _left(tmp_path)
        os.killpg(running.pid, signal.SIGINT)
        _, said = running.communicate(timeout=30)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 130 and said.endswith("interrupted\n"), said
    assert not _left(tmp_path)


def test_nothing_is_left_when_it_is_killed(hosts_can_be_made: None, tmp_path: Path) -> None:
    running = subprocess.Popen([*_DEMO, tmp_path / "both.svg"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True, env=_environment(tmp_path))
    assert running.stderr
    while "measuring what stations cost" not in (line := running.stderr.readline()):
        assert line, "it has ended"
    running.kill()
    running.wait()
    running.stderr.close()
    deadline = time.monotonic() + 10
    while left := _left(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _environment(folder: Path) -> dict[str, str]:
    """By which what it starts is told from what others do."""
    return {**os.environ, "TMPDIR": str(folder), "FULLPIPE_DEMO_TEST": str(folder)}


def _left(folder: Path) -> list[str]:
    """Processes that it has started, and hosts that it has made."""
    ours = [one for one in psutil.process_iter(["environ", "pid", "cmdline"])
            if (one.info["environ"] or {}).get("FULLPIPE_DEMO_TEST") == str(folder)]
    keepers = [one.info["pid"] for one in ours if netlab_hosts.KEEPER in (one.info["cmdline"] or ())]
    names = [name for name in os.listdir("/run/netns") if any(name.startswith(f"fp{pid}-") for pid in keepers)]
    return [*map(str, ours), *names]
