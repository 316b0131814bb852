"""The application over a service that answers at once, for tests that send it very much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from openai_server import byte_tokenizer

from fullpipe.engine import RequestStats
from fullpipe.errors import PromptError
from fullpipe.options import ServerOptions
from fullpipe.request import SamplingParams
from fullpipe.server.app import ServedModel, create_app
from fullpipe.service import Deliver, Ticket, Update
from fullpipe.supervision import Status

MAX_BODY = 20_000
MAX_LEN = 128


class OneWord:
    """A test double of the service: it answers every prompt with one token, and remembers what it was asked."""

    capacity = 1000

    def __init__(self) -> None:
        self.asked: list[SamplingParams] = []

    def submit(self, prompt: Sequence[int], params: SamplingParams, deliver: Deliver, *, priority: int = 0,
               timeout_s: float | None = None) -> Ticket:
        if not prompt:
            raise PromptError("the prompt is empty")
        self.asked.append(params)
        told = [] if params.logprobs is None else [[(1, -0.5), *((2 + k, -1.0) for k in range(params.logprobs))]]
        deliver(Update("yes", [1], told, reason="length"))
        return Ticket(len(self.asked), len(prompt), RequestStats(0.0))

    def cancel(self, ticket: Ticket) -> None:
        pass

    def status(self) -> Status:
        return Status("ready", 0, 0, 0, 0, 0)


def application(service: OneWord, options: ServerOptions | None = None, **more: Any) -> FastAPI:
    """It serves the model "m", whose tokens are bytes. options: by default with a small limit on bodies."""
    model = ServedModel(("m",), byte_tokenizer(), MAX_LEN)
    options = options or ServerOptions(max_body_bytes=MAX_BODY, body_timeout=0.3)
    return create_app(service, model, options, **more)  # type: ignore[arg-type]
