"""Servers for the tests of the application."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from asked import Asked
from fake_service import FakeService
from openai_server import MAX_MODEL_LEN, Serve, Served, byte_tokenizer, fresh, running

from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.options import ServerOptions
from fullpipe.server.app import ServedModel, create_app


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def start(tokenizer: Tokenizer) -> Iterator[Serve]:
    """Starts servers, which live as long as the session."""
    with ExitStack() as stack:
        def begin(options: ServerOptions | None = None, names: Sequence[str] = ("tiny", "alias/tiny"),
                  send_buffer: int | None = None, sampling: Mapping[str, Any] | None = None, **more: Any) -> Served:
            service = FakeService(tokenizer, lambda prompt, params: [])
            stack.callback(service.close)
            model = ServedModel(names, tokenizer, MAX_MODEL_LEN, created=1700000000, sampling=sampling or {})
            app = create_app(service, model, options, **more)  # type: ignore[arg-type]
            return Served(stack.enter_context(running(app, send_buffer)), service, tokenizer)

        yield begin


@pytest.fixture(scope="session")
def common(start: Serve) -> Served:
    return start(metrics=lambda: (b"fullpipe_up 1\n", "text/plain; version=0.0.4; charset=utf-8"))


@pytest.fixture
def asking() -> Iterator[Callable[..., Asked]]:
    """Makes servers whose model has a template of one's choice, for one test."""
    with ExitStack() as stack:
        def make(template: str | None, **more: Any) -> Asked:
            asked = Asked(template, **more)
            stack.callback(asked.service.close)
            return asked

        yield make


@pytest.fixture
def served(common: Served) -> Served:
    """One server for all tests, put back into its first state."""
    fresh(common)
    return common
