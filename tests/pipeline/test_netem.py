"""A real network's delay: stages in a network namespace whose loopback the kernel slows down (`tc netem`).

What the emulated links imitate, from the other side: here nothing in this package waits for anything but
the packets. Needs root, `ip`, `tc` and a kernel with netem; skipped, with the reason, where one is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.processes

DELAY_S, STAGES, FLIGHTS = 0.01, 3, 12

# Flights one after another through three stages; the median trip, in seconds, is printed.
SCRIPT = textwrap.dedent("""
    import json, statistics, sys
    sys.path.insert(0, {folder!r})
    from test_emulation import WorkersPipeline, _guess, _landings, _prompt, _stages
    trips = []
    with WorkersPipeline(_stages(*[0.0] * {stages})) as pipeline:
        for number in range({flights}):
            begun = pipeline.now()
            pipeline.launch(_guess(number) if number else _prompt(1))
            trips.append(_landings(pipeline, 1)[0].time - begun)
    print(json.dumps(statistics.median(trips)))
""")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def _must(*command: str) -> None:
    """Run it, or skip the test with what it said."""
    done = _run(*command)
    if done.returncode:
        pytest.skip(f"`{' '.join(command)}` is not possible here: {done.stderr.strip()}")


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace with a loopback of its own."""
    if not sys.platform.startswith("linux") or os.geteuid():
        pytest.skip("only root on Linux may make a network namespace")
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(missing)} (iproute2)")
    name = f"fullpipe-{os.getpid()}"
    _must("ip", "netns", "add", name)
    try:
        _must("ip", "netns", "exec", name, "ip", "link", "set", "lo", "up")
        yield name
    finally:
        _run("ip", "netns", "delete", name)


def _trip_s(namespace: str) -> float:
    """The median time of a flight through all stages, in the namespace."""
    code = SCRIPT.format(folder=os.path.dirname(__file__), stages=STAGES, flights=FLIGHTS)
    done = _run("ip", "netns", "exec", namespace, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    trip: float = json.loads(done.stdout)
    return trip


def test_every_hop_takes_the_networks_delay(namespace: str) -> None:
    """Control connections are no network; the hops from stage to stage are. A receive is posted before its flight
    comes, so a hop costs one delay; gloo's own acknowledgements may add to it, never take from it."""
    _must("ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay",
          f"{DELAY_S * 1e3:g}ms")
    slow = _trip_s(namespace)
    assert _run("ip", "netns", "exec", namespace, "tc", "qdisc", "del", "dev", "lo", "root").returncode == 0
    fast = _trip_s(namespace)
    hops = STAGES - 1
    assert hops * DELAY_S <= slow
    assert 0.8 * hops * DELAY_S <= slow - fast <= 4 * hops * DELAY_S
