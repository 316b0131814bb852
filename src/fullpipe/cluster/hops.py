"""Two processes of this machine send a message to and fro, as stages do, to learn what a hop costs.

    python -m fullpipe.cluster.hops RANK MEETING_FILE REPEATS SIZE...

is one of the two; rank 0 prints a line `SIZE SECONDS` per sample. A sample is half a round trip: packing, gloo, and
unpacking, both ways. The calling process loads no torch and joins no process group.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np

from fullpipe.errors import PipelineError
from fullpipe.pipeline.wire import Bytes, pack, unpack

_WARM_UP = 5  # rounds before the first that counts
_MEET_S = 60  # for the two processes to start and find each other; importing torch takes most of it
_ROUND_S = 1.0  # a round trip takes milliseconds; longer than this is a machine that has stalled


def measure_hops(sizes: Sequence[int], repeats: int, progress: Callable[[int], None]) -> dict[int, list[float]]:
    """Seconds of one way, `repeats` samples by size in bytes. progress: told the number of samples so far.

    Raises PipelineError when the two processes do not come to an end.
    """
    with tempfile.TemporaryDirectory(prefix="fullpipe-hops-") as folder:
        both = [_start(rank, Path(folder) / "meeting", sizes, repeats) for rank in (0, 1)]
        try:
            return _collect(both, sizes, repeats, progress)
        finally:
            for process in both:
                process.kill()
                process.communicate()


def _start(rank: int, meeting: Path, sizes: Sequence[int], repeats: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fullpipe.cluster.hops", str(rank), str(meeting), str(repeats), *map(str, sizes)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


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
        told = both[0].communicate()[1].strip().splitlines()
        raise PipelineError(f"two processes of this machine could not talk: {told[-1] if told else 'no word'}",
                            hint="Gloo needs the loopback interface; is it up?")
    return samples


def main() -> None:
    rank, meeting, repeats, *sizes = sys.argv[1:]
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    wait = timedelta(seconds=_MEET_S + _ROUND_S * int(repeats))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2, timeout=wait)
    ends = {int(size): _End(1 - int(rank), int(size)) for size in sizes}
    for turn in range(_WARM_UP + int(repeats)):
        for size, end in ends.items():  # in turn, so that a noisy moment hits all alike
            if rank == "1":
                end.answer()
                continue
            seconds = end.call()
            if turn >= _WARM_UP:
                print(size, seconds, flush=True)
    dist.destroy_process_group()


class _End:
    """Is one end of the way for messages of `size` bytes of hidden rows. other: rank of the other end."""

    def __init__(self, other: int, size: int) -> None:
        import torch

        self._other = other
        self._rows: Bytes = np.zeros(size, np.uint8)
        self._room = torch.empty(len(pack(None, self._rows)), dtype=torch.uint8)

    def call(self) -> float:
        """To and fro; half the time that it took, in seconds."""
        start = time.perf_counter()
        self._send(self._rows)
        self._receive()
        return (time.perf_counter() - start) / 2

    def answer(self) -> None:
        self._send(self._receive())

    def _send(self, rows: Bytes) -> None:
        import torch
        import torch.distributed as dist

        dist.send(torch.from_numpy(pack(None, rows)), dst=self._other)

    def _receive(self) -> Bytes:
        import torch.distributed as dist

        dist.recv(self._room, src=self._other)
        rows: Bytes = unpack(self._room.numpy(), None)[1]
        return rows


if __name__ == "__main__":
    main()
