"""A head runs a pipeline of scripted stages on other hosts, and tells what comes back.

    python transport_head.py ASKED

It prints a line of JSON when the pipeline is up, for every landing, for a failure, and when it has closed: then, or
when all flights have landed.
"""

from __future__ import annotations

import logging
import sys
import time
from functools import partial
from typing import Any

import msgspec

from fullpipe.messages import Failed, Flight, Landed, Opening, Part, Ready
from fullpipe.pipeline.launch.local import LocalLauncher
from fullpipe.pipeline.starting import Hosting, Place
from fullpipe.pipeline.workers import WorkersPipeline
from fullpipe.request import SamplingParams
from fullpipe.stations.spec import StationSpec

TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}
DELAY_S = 0.01


class Asked(msgspec.Struct):
    """head, stages: hosts. addresses: of all of them. prefixes: commands that run others there."""

    head: str
    stages: list[str]
    addresses: dict[str, str]
    prefixes: dict[str, list[str]]
    heartbeat_timeout: float
    flights: int


def flight(number: int) -> Flight:
    """Number 0 opens a request with one prompt token; number n is one guess, node n, behind it."""
    if number == 0:
        return Flight(0, [Part(0, [0], [0], [7], [0], [0], [[]], [True])], [Opening(0, 1, SamplingParams())])
    return Flight(number, [Part(0, [], [number], [number], [1], [number], [[number]], [True])])


def say(**what: Any) -> None:
    print(msgspec.json.encode(what).decode(), flush=True)


def main() -> None:
    logging.basicConfig(level="INFO")
    asked = msgspec.json.decode(sys.argv[1], type=Asked)
    count = len(asked.stages)
    stages = [StationSpec("fullpipe.stations.scripted:ScriptedStage",
                          {"index": index, "num_stages": count, "delay_s": DELAY_S, "truth": TRUTH})
              for index in range(count)]
    places = [Place(host, asked.addresses[host]) for host in [asked.head, *asked.stages]]
    hosting = Hosting(places[1:], places[0], partial(LocalLauncher, asked.prefixes))
    with WorkersPipeline(stages, hosting=hosting, heartbeat_timeout=asked.heartbeat_timeout,
                         start_timeout=30.0) as pipeline:
        say(up=True)
        fly(pipeline, asked.flights)
        closing = time.monotonic()
    say(closed_s=time.monotonic() - closing)


def fly(pipeline: WorkersPipeline, flights: int) -> None:
    """Until all have landed, or the pipeline has failed."""
    launched = landed = ready = 0
    while landed < flights:
        for event in pipeline.events(5.0):
            match event:
                case Ready():
                    ready += 1
                case Landed():
                    landed += 1
                    say(flight=event.flight, tokens=event.tokens)
                case Failed():  # it may have come with a `Ready`, and nothing may be launched then
                    say(station=event.station, reason=event.reason)
                    return
        while ready and launched < flights:
            pipeline.launch(flight(launched))
            launched, ready = launched + 1, ready - 1


if __name__ == "__main__":
    main()
