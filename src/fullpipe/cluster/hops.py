"""Two processes of this machine send a message to and fro, as stages do, to learn what a hop costs.

    python -m fullpipe.cluster.hops

is one of the two, which reads its `_Task` from standard input; the one that calls prints a line `SIZE SECONDS` per
sample. A sample is half a round trip: packing, ZeroMQ, and unpacking, both ways.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import zmq
from msgspec import Struct

from fullpipe.errors import PipelineError, UsageError
from fullpipe.pipeline.bell import Socket
from fullpipe.pipeline.keys import RunKeys
from fullpipe.pipeline.net import Net, local_endpoint
from fullpipe.pipeline.wire import Bytes, pack, unpack

_WARM_UP = 5  # rounds before the first that counts
_MEET_S = 60.0  # for the two processes to start and find each other


class _Task(Struct):
    """Says what one of the two does."""

    endpoint: str
    keys: RunKeys
    calls: bool
    repeats: int
    sizes: list[int]


def measure_hops(sizes: Sequence[int], repeats: int, progress: Callable[[int], None]) -> dict[int, list[float]]:
    """Seconds of one way, `repeats` samples by size in bytes. progress: told the number of samples so far.

    Raises PipelineError when the two processes do not come to an end.
    """
    task = _Task(local_endpoint(), RunKeys.new(), False, repeats, list(sizes))
    both = [_start(msgspec.structs.replace(task, calls=calls)) for calls in (True, False)]
    threading.Thread(target=_end_caller_with, args=both, daemon=True).start()
    try:
        return _collect(both, sizes, repeats, progress)
    finally:
        for process in both:
            process.kill()
            process.communicate()


def _start(task: _Task) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-m", "fullpipe.cluster.hops"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin
    process.stdin.write(msgspec.json.encode(task).decode() + "\n")
    process.stdin.flush()
    return process


def _end_caller_with(caller: subprocess.Popen[str], answerer: subprocess.Popen[str]) -> None:
    """It would wait for an answer for ever."""
    answerer.wait()
    caller.kill()


def _collect(both: list[subprocess.Popen[str]], sizes: Sequence[int], repeats: int,
             progress: Callable[[int], None]) -> dict[int, list[float]]:
    samples: dict[int, list[float]] = {size: [] for size in sizes}
    assert both[0].stdout is not None
    for line in both[0].stdout:
        size, seconds = line.split()
        samples[int(size)].append(float(seconds))
        progress(sum(map(len, samples.values())))
    if any(len(found) != repeats for found in samples.values()):
        both[1].kill()
        told = [line for process in both for line in process.communicate()[1].strip().splitlines()]
        raise PipelineError(f"two processes of this machine could not talk: {told[-1] if told else 'no word'}",
                            hint="Try again; the processes may have run out of memory.")
    return samples


def main() -> None:
    task = msgspec.json.decode(sys.stdin.readline(), type=_Task)
    net = Net(task.keys, _MEET_S)
    try:
        _call(net.connect(task.endpoint, "caller"), task) if task.calls else _answer(net, task)
    except UsageError as error:
        sys.exit(error.message)


def _call(socket: Socket, task: _Task) -> None:
    socket.setsockopt(zmq.RCVTIMEO, round(1e3 * _MEET_S))
    rows = {size: np.zeros(size, np.uint8) for size in task.sizes}
    for turn in range(_WARM_UP + task.repeats):
        for size in task.sizes:  # in turn, so that a noisy moment hits all alike
            start = time.perf_counter()
            socket.send_multipart(pack(None, {"rows": rows[size]}))
            _unpacked(socket.recv_multipart(copy=False))
            if turn >= _WARM_UP:
                print(size, (time.perf_counter() - start) / 2, flush=True)


def _answer(net: Net, task: _Task) -> None:
    socket, _ = net.bind([task.endpoint])
    while True:
        who, *frames = socket.recv_multipart(copy=False)
        socket.send_multipart([who, *pack(None, {"rows": _unpacked(frames)})])


def _unpacked(frames: Sequence[object]) -> Bytes:
    rows: Bytes = unpack([frame.buffer for frame in frames], None)[1]["rows"]  # type: ignore[attr-defined]
    return rows


if __name__ == "__main__":
    main()
