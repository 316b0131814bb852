"""A runner that computes nothing, and can go wrong in every way there is (`mode` in its set-up)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fullpipe_lab

sys.path.insert(0, str(Path(fullpipe_lab.__file__).parent / "peers" / "runners"))

from peer_protocol import Answer, Setup, serve


def load(setup: Setup) -> tuple[str, Setup, Answer]:
    mode, settings, asked = setup["mode"], {"threads": setup["threads"]}, []
    if mode == "load crashes":
        raise ValueError("no such\nmodel")
    if mode == "has a child":
        settings["child"] = subprocess.Popen(["sleep", "60"]).pid
    print("libraries print things", flush=True)

    def answer(prompt: list[int], max_tokens: int) -> Iterator[list[int]]:
        asked.append(prompt)
        print("again", flush=True)
        if mode == "dies" and len(asked) == 3:
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)
        if mode == "hangs":
            threading.Event().wait()
        if mode == "too many":
            max_tokens += 1
        # The tokens after the prompt's last, two at a time.
        tokens = [prompt[-1] + 1 + index for index in range(max_tokens)]
        for first in range(0, len(tokens), 2):
            yield tokens[first : first + 2]

    return "1.2", settings, answer


if sys.argv[0] == __file__:
    serve(load)
