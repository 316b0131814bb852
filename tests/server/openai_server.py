"""The application over a fake service, on a real socket, and what tests need to talk to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import tokenizers
import uvicorn
from fake_service import FakeService
from fastapi import FastAPI

from fullpipe.models.tokens.template import ChatTemplate
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.request import SamplingParams

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_MODEL_LEN = 400


def byte_tokenizer() -> Tokenizer:
    """A token for every byte, so that characters are cut wherever they can be."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, frozenset({257}), ChatTemplate(CHATML), name="bytes")


@dataclass
class Served:
    """url: of the server. service: what it asks."""

    url: str
    service: FakeService
    tokenizer: Tokenizer

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=10, **more)

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=10)

    def script(self, text: str) -> None:
        """What every request is answered from now on."""
        self.service.script = lambda prompt, params: self.tokenizer.encode(text)


@contextmanager
def running(app: FastAPI, send_buffer: int | None = None) -> Iterator[str]:
    """The address of a server with this application. send_buffer: bytes that the system takes of an answer."""
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # connections inherit it
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none",
                                           timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def fresh(served: Served) -> None:
    service = served.service

    def script(prompt: Sequence[int], params: SamplingParams) -> list[int]:
        return served.tokenizer.encode(f"You said {len(prompt)} tokens, seed {params.seed % 1000}. Ünï 🙂!")

    service.script, service.refuse, service.fail_after, service.hold_at = script, None, None, float("inf")
    service.capacity, service.fail_with = 1000, "error"
    service.submitted.clear()
    service.cancelled.clear()


Serve = Callable[..., Served]
"""Starts a server: options, model names, and what else `create_app` takes."""
