"""Chats with tools, structures and thoughts, over a fake service whose model has a template of one's choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openai
from fake_service import FakeService
from openai_server import byte_tokenizer
from starlette.testclient import TestClient

from fullpipe.models.tokens.template import ChatTemplate
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.options import ServerOptions
from fullpipe.request import SamplingParams, Structured
from fullpipe.server.app import ServedModel, create_app

LENGTH = 8000
USER: dict[str, Any] = {"role": "user", "content": "hi"}


def tokenizer_with(template: str | None, special: Sequence[str] = ()) -> Tokenizer:
    """A token for every byte, and these."""
    backend = byte_tokenizer().backend
    backend.add_special_tokens(list(special))
    return Tokenizer(backend, frozenset({257}), None if template is None else ChatTemplate(template), name="bytes")


class Asked:
    """A server of the model "m", which says "Hello.".

    special: texts of special tokens beside those that it has.
    """

    def __init__(self, template: str | None, *, special: Sequence[str] = (), **options: Any) -> None:
        self.tokenizer = tokenizer_with(template, special)
        self.service = FakeService(self.tokenizer, lambda prompt, params: self.tokenizer.encode("Hello."))
        model = ServedModel(("m",), self.tokenizer, LENGTH)
        self.http = TestClient(create_app(self.service, model, ServerOptions(**options)))  # type: ignore[arg-type]
        self.openai = openai.OpenAI(base_url="http://testserver/v1", api_key="x", max_retries=0, http_client=self.http)

    def say(self, text: str) -> None:
        """What every request is answered from now on."""
        self.service.script = lambda prompt, params: self.tokenizer.encode(text)

    def chat(self, **more: Any) -> Any:
        """The body of an answer."""
        return self.http.post("/v1/chat/completions", json={"model": "m", "messages": [USER], **more}).json()

    def message(self, **more: Any) -> Any:
        return self.chat(**more)["choices"][0]["message"]

    def refusal(self, path: str = "/v1/chat/completions", **more: Any) -> dict[str, Any]:
        """The error of a 400; nothing has reached the service."""
        before = len(self.service.submitted)
        said: dict[str, Any] = {"messages": [USER]} if path.endswith("chat/completions") else {"prompt": "hi"}
        response = self.http.post(path, json={"model": "m", **said, **more})
        assert response.status_code == 400, response.text
        assert len(self.service.submitted) == before
        return dict(response.json()["error"])

    @property
    def prompt(self) -> str:
        """The last one."""
        return str(self.tokenizer.backend.decode(self.service.submitted[-1][0], skip_special_tokens=False))

    @property
    def params(self) -> SamplingParams:
        return self.service.submitted[-1][1]

    @property
    def structured(self) -> Structured:
        assert self.params.structured is not None
        return self.params.structured
