"""A model on imagined machines behind the front door in Python, for tests that count steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fullpipe.assembly import prepare
from fullpipe.engine import Listener
from fullpipe.llm import LLM
from fullpipe.options import Options
from fullpipe.pipeline.durations import unit_costs
from fullpipe.pipeline.inprocess import InProcessPipeline


def simulated(model: object, *, listeners: Iterable[Listener] = (), **options: Any) -> LLM:
    """In virtual time, where every step of a stage and every call of the draft takes one second."""
    prepared = prepare(Options.of(model=str(model), **options))
    torch.set_num_threads(prepared.options.pipeline.threads or 1)
    pipeline = InProcessPipeline(*prepared.build(), clock="virtual", costs=unit_costs)
    return LLM.over(prepared, pipeline, listeners=listeners)
