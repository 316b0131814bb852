"""Text becomes tokens and tokens become text over HTTP too, as vLLM has it; and what this server does not do is refused
by name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, Field

from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.server.problems import Problem
from fullpipe.server.protocol.extras import Token
from fullpipe.server.protocol.requests import Message, NoneListed, Nothing
from fullpipe.server.protocol.wire import MAX_ENTRIES, Wire, measured

Tokenise = Callable[[Sequence[Callable[[], list[int]]], str], Awaitable[list[list[int]]]]
"""Runs encoders in a thread; a fault of a prompt is blamed on the field that is named."""

_OF_TEXT = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")  # and make no sense there


class TokenizeRequest(Wire):
    """Asks for the tokens of a text or of a conversation, one of the two.

    add_special_tokens: put around it what the model puts around plain text; by default so of a text, and not of a
    conversation, whose template does.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=MAX_ENTRIES), BeforeValidator(measured)] | None \
        = None
    # not supported
    chat_template: Nothing = None
    tools: NoneListed | None = None


class Tokenized(BaseModel):
    """token_strs: as the vocabulary has them, where they are asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Wire):
    model: str | None = None
    tokens: Annotated[list[Token], Field(fail_fast=True)]


class Detokenized(BaseModel):
    prompt: str


class Tokens:
    """Answers with tokens and texts. known: raises `Problem` for names of models that are not served."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int, known: Callable[[str], str],
                 tokenise: Tokenise) -> None:
        self._tokenizer, self._max_model_len = tokenizer, max_model_len
        self._known, self._tokenise = known, tokenise

    def add_routes(self, router: APIRouter, responses: dict[int | str, dict[str, Any]]) -> APIRouter:
        """To a router that takes JSON alone."""

        @router.post("/tokenize", responses=responses)
        async def tokenize(body: TokenizeRequest) -> Tokenized:
            return await self.tokenize(body)

        @router.post("/detokenize", responses=responses)
        async def detokenize(body: DetokenizeRequest) -> Detokenized:
            return await self.detokenize(body)

        return router

    async def tokenize(self, body: TokenizeRequest) -> Tokenized:
        if body.model is not None:
            self._known(body.model)
        _check_one(body)
        named: list[str] = []

        def encode() -> list[int]:
            tokens = self._encode(body)
            if body.return_token_strs:
                named.extend(self._tokenizer.tokens[token] for token in tokens)
            return tokens

        (tokens,) = await self._tokenise([encode], "prompt" if body.messages is None else "messages")
        return Tokenized(count=len(tokens), max_model_len=self._max_model_len, tokens=tokens,
                         token_strs=named if body.return_token_strs else None)

    def _encode(self, body: TokenizeRequest) -> list[int]:
        if body.messages is None:
            return self._tokenizer.encode(body.prompt or "", add_special=body.add_special_tokens is not False)
        return self._tokenizer.chat([message.plain() for message in body.messages],
                                    add_generation_prompt=body.add_generation_prompt,
                                    continue_final_message=bool(body.continue_final_message),
                                    chat_template_kwargs=body.chat_template_kwargs,
                                    add_special=bool(body.add_special_tokens))

    async def detokenize(self, body: DetokenizeRequest) -> Detokenized:
        if body.model is not None:
            self._known(body.model)
        said: list[str] = []

        def decode() -> list[int]:
            if (bad := next((token for token in body.tokens if token not in self._tokenizer.tokens), None)) is not None:
                raise Problem(400, f"tokens: the model has no token {bad}", param="tokens")
            said.append(self._tokenizer.decode(body.tokens, skip_special_tokens=False))
            return body.tokens

        await self._tokenise([decode], "tokens")
        return Detokenized(prompt=said[0])


def _check_one(body: TokenizeRequest) -> None:
    if (body.prompt is None) == (body.messages is None):
        raise Problem(400, "prompt or messages: one of the two is needed, and no more", param="prompt")
    if body.messages is None:
        for name in _OF_TEXT:
            if getattr(body, name) is not None:
                raise Problem(400, f"{name}: a prompt is plain text, and no chat template says it", param=name)


# ---- what others do --------------------------------------------------------------------------------------------------

_ELSEWHERE = {
    "embeddings": ("/v1/embeddings", "/embeddings", "/v2/embed"),
    "scores of pairs": ("/v1/score", "/score"),
    "ranking": ("/v1/rerank", "/v2/rerank", "/rerank"),
    "pooling": ("/pooling",),
    "classes": ("/v1/classify", "/classify"),
    "speech": ("/v1/audio/speech", "/v1/audio/transcriptions", "/v1/audio/translations"),
    "images": ("/v1/images/generations", "/v1/images/edits", "/v1/images/variations"),
    "moderation": ("/v1/moderations",),
    "files": ("/v1/files", "/v1/batches", "/v1/uploads"),
    "training": ("/v1/fine_tuning/jobs",),
}


def refusals(router: APIRouter) -> APIRouter:
    """Have a router say by name what this server does not do."""
    for what, paths in _ELSEWHERE.items():
        for path in paths:
            router.add_api_route(path, _refusing(what, path), methods=["GET", "POST"], include_in_schema=False)
    return router


def _refusing(what: str, path: str) -> Callable[[], Awaitable[None]]:
    async def refuse() -> None:
        raise Problem(404, f"this server generates text only; it has no {what} ({path})", code="unsupported_endpoint")

    return refuse
