"""One station's process begins: `python -m fullpipe.pipeline.worker`, started by `launch`.

Standard input is the control connection, a socket; its first message is the `Setup`, which names the station to build.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from functools import partial
from typing import cast

from fullpipe.pipeline.frames import Setup, ToWorker, Up
from fullpipe.pipeline.hops import join_world
from fullpipe.pipeline.serve import Control, leave, serve_draft, serve_reader, serve_stage
from fullpipe.pipeline.taps import TapArrival, TapSender, receive_taps
from fullpipe.pipeline.wire import Channel
from fullpipe.stations.base import DraftLike, StageLike, cache_slots, tap_reader

_PR_SET_PDEATHSIG = 1
_SWITCH_S = 0.0005  # longest wait for the interpreter lock, so that the side threads are prompt


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent is gone, even if it is stopped or cannot listen.
    Where there is no such service the closing of the control connection must do."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before we asked
        leave(0)


def control_connection() -> Channel[ToWorker]:
    """The socket that standard input is; standard input becomes empty, so that nothing else reads it."""
    sock = socket.socket(fileno=os.dup(0))
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return Channel(sock, ToWorker)


def main() -> None:
    """Take the setup, build the station, serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = control_connection()
    frames: list[ToWorker] = []
    try:
        while not frames:
            frames = channel.receive()
    except EOFError:
        leave(0)
    setup, *unread = frames
    assert isinstance(setup, Setup)
    die_with_parent(setup.parent)
    sys.setswitchinterval(_SWITCH_S)
    control = Control(channel, setup)
    control.start_threads(unread)
    control.report(partial(_build_and_serve, control, setup))
    threading.Event().wait()  # until the engine says stop, or is gone


def _build_and_serve(control: Control, setup: Setup) -> None:
    station = setup.spec.build()
    if torch := sys.modules.get("torch"):  # a station without tensors does not need it loaded
        torch.set_num_threads(setup.threads)
    if setup.world > 1:
        join_world(setup)
    if setup.rank < setup.stages:
        control.send(Up(cache_slots(cast(StageLike, station))))
        taps = TapSender(control, setup.stages) if setup.rank in setup.tapping else None
        serve_stage(control, cast(StageLike, station), setup, taps)
    else:
        _serve_draft_station(control, cast(DraftLike, station), setup.tapping)


def _serve_draft_station(control: Control, draft: DraftLike, tapping: list[int]) -> None:
    reader = tap_reader(draft)
    control.reads_taps = reader is not None  # from before the first cancel
    control.send(Up(cache_slots(draft)))
    for stage in tapping:  # someone must take them in even where nobody reads them
        deliver = control.inbox.put if reader else _ignore
        control.start_thread(f"taps of stage {stage}", partial(receive_taps, stage, control.links.tap(stage), deliver))
    serve_reader(control, reader) if reader else serve_draft(control, draft)


def _ignore(arrival: TapArrival) -> None:
    pass


if __name__ == "__main__":
    main()
