"""The HTTP application has OpenAI's endpoints over a `Service`. It decides nothing about tokens.

A request is checked, its prompts are tokenised in a thread, each choice becomes a ticket, and from there on news come
from the engine's thread through a mailbox (`answer.py`). The first news are waited for before anything is sent, so that
what fails at once has a status of its own.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio.to_thread
import pydantic_core
from anyio import CapacityLimiter
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from fullpipe.errors import FullpipeError, MessageError, MissingExtra, PromptError, UnsupportedModel, UsageError
from fullpipe.models.tokens.checking import check_structure, is_known
from fullpipe.models.tokens.tokenizer import Tokenizer
from fullpipe.options import ServerOptions
from fullpipe.request import SamplingParams
from fullpipe.server.answer import Answer, ClientGone, News
from fullpipe.server.besides import check_least, for_chat, for_text, kept, spelling
from fullpipe.server.forms import Form, Forms
from fullpipe.server.guard import EventStream, Guard, Keyring, log, needs_key, request_id
from fullpipe.server.places import CHAT, COMPLETIONS, Door, no_such_method, no_such_path
from fullpipe.server.problems import TOO_LONG, ErrorBody, Problem, failure, problem_of, retry_after, told
from fullpipe.server.protocol.answers import (
    ChatCompletion,
    Health,
    ModelCard,
    ModelList,
    Readiness,
    TextCompletion,
    Version,
)
from fullpipe.server.protocol.requests import ChatRequest, CompletionRequest, Options
from fullpipe.server.protocol.tables import IGNORED
from fullpipe.server.replies import VERSION, ChatReplies, Replies, TextReplies, usage_of
from fullpipe.server.responses.answers import ResponseObject
from fullpipe.server.responses.asking import Turns, as_chat
from fullpipe.server.responses.protocol import ResponsesRequest
from fullpipe.server.responses.replies import ResponseReplies, echo
from fullpipe.server.responses.tables import ELSEWHERE, REFUSED
from fullpipe.server.tokens import DetokenizeRequest, TokenizeRequest, Tokens, refusals
from fullpipe.service import Service

Metrics = Callable[[], tuple[bytes, str]]
"""What Prometheus reads, and its content type."""

# What is asked where, by the ends of paths.
_DOORS = {"/chat/completions": CHAT, "/completions": COMPLETIONS,
          "/responses": Door(ResponsesRequest, REFUSED, ELSEWHERE),
          "/tokenize": Door(TokenizeRequest), "/detokenize": Door(DetokenizeRequest)}
_TOKENISERS = 4  # threads at most: the stages need the cores
_MOST_SAID = 200  # ignored fields that a log tells of; names of variables are the callers' own
_COMPLETION_TOKENS = 16  # OpenAI's and vLLM's default of max_tokens for completions; a chat's is what room there is


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Says what callers must know of the model.

    names: all that callers may use; the first is the one that is told. created: seconds since 1970.
    max_model_len: tokens of prompt and answer together. sampling: fields of `SamplingParams` that the model's files ask
    for; they count where a request leaves a field out, before OpenAI's defaults.
    """

    names: Sequence[str]
    tokenizer: Tokenizer
    max_model_len: int
    created: int = field(default_factory=lambda: int(time.time()))
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def card(self, name: str) -> ModelCard:
        return ModelCard(id=name, created=self.created, root=self.names[0], max_model_len=self.max_model_len)


def create_app(service: Service[Any], model: ServedModel, options: ServerOptions | None = None,
               extras: Sequence[APIRouter] = (), *, metrics: Metrics | None = None) -> FastAPI:
    """The application, which neither starts nor stops the service.

    extras: routers of others, outside /v1: a route there is open to all unless it depends on `guard.needs_key`.
    metrics: what /metrics answers.
    """
    options = options or ServerOptions()
    app = FastAPI(title="Fullpipe", version=VERSION, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.root_path = options.root_path  # and not the server's, which would put it before paths that have it already
    for kind in (HTTPException, RequestValidationError, FullpipeError):
        app.add_exception_handler(kind, _answer_with_problem)
    app.state.keyring = Keyring(options.api_key)
    asking = _Asking(service, model, options)
    routers = [_openai_routes(asking, options, prefix) for prefix in ("/v1", "")]  # some clients have an address so
    routers += [_token_routes(asking, options), _house_routes(service, metrics), *extras]
    for router in routers:
        app.include_router(router)
    app.state.places = [route for router in routers for route in router.routes]
    app.add_middleware(Guard, options=options)
    if options.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(options.allowed_origins),
                           allow_methods=list(options.allowed_methods), allow_headers=list(options.allowed_headers),
                           allow_credentials=options.allow_credentials, expose_headers=["x-request-id", "retry-after"])
    return app


def _answer_with_problem(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and not isinstance(error, Problem):
        error = _nowhere(request, error)
    door = next((door for end, door in _DOORS.items() if request.scope["path"].endswith(end)), CHAT)
    problem = problem_of(error, door)
    if problem.status_code >= 500:
        log.warning("%s %s", request_id(request.scope), error)
    return problem.response()


def _nowhere(request: Request, error: HTTPException) -> HTTPException:
    """What the router says of a path or a method that is not here, in words that lead on."""
    if error.status_code == 404:
        return Problem(404, no_such_path(request), code="not_found")
    if error.status_code == 405:
        said, allowed = no_such_method(request)
        return Problem(405, said, code="method_not_allowed", headers={"Allow": allowed}) if allowed else error
    return error


# ---- routes ----------------------------------------------------------------------------------------------------------


def _refusals(**which: str) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: these statuses have the error's shape."""
    return {key.removeprefix("s"): {"model": ErrorBody, "description": text} for key, text in which.items()}


_CLOSED = _refusals(s401="No valid API key", s429="Too many requests at once")
_ASKING = _CLOSED | _refusals(
    s400="Something in the request cannot be done", s404="Unknown model", s408="The body came too slowly",
    s413="The body is too large", s415="The body is not JSON", s500="The request failed",
    s503="The service takes no requests now", s4XX="Any other refusal",
)


def _streamed(each: str) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: the answer may be a stream. each: what its events are."""
    return {200: {"description": f"The answer, or with `stream` its parts as server-sent events, {each}",
                  "content": {"text/event-stream": {"itemSchema": {
                      "type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}}}}}


_STREAM = _streamed("each the JSON of one chunk or error, and `[DONE]` behind the last")
_EVENTS = _streamed("each with its type, and the JSON of it; the last is completed, incomplete or failed")


class _GuardedRoute(APIRoute):
    """Asks for a key, wherever the application is mounted, before a byte of the body is read. Of bodies it takes JSON
    alone."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            needs_key(request)
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if self.body_field is not None and kind != "application/json":
                raise Problem(415, f"the content type must be application/json (got {kind[:60]!r}); send the header "
                                   "`Content-Type: application/json`")
            return await handle(_JsonRequest(request.scope, request.receive))

        return guarded


class _JsonRequest(Request):
    """Reads JSON as the standard has it: no NaN, no lone surrogates, no bottomless nesting."""

    async def json(self) -> Any:
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise Problem(400, f"the body is not JSON: {error}", code="invalid_json") from None


def _openai_routes(asking: _Asking, options: ServerOptions, prefix: str) -> APIRouter:
    """The routes below `/v1`, which the document tells of, or another prefix."""
    # The route looks at keys; the dependency only says in the document that there is one.
    key = [Depends(HTTPBearer(auto_error=False))] if options.api_key else []
    router = APIRouter(prefix=prefix, tags=["OpenAI"], dependencies=key, route_class=_GuardedRoute,
                       include_in_schema=prefix == "/v1")

    @router.post("/chat/completions", response_model=ChatCompletion, responses=_ASKING | _STREAM)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await asking.chat(body, request)

    @router.post("/completions", response_model=TextCompletion, responses=_ASKING | _STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await asking.complete(body, request)

    @router.post("/responses", response_model=ResponseObject, responses=_ASKING | _EVENTS)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        return await asking.respond(body, request)

    @router.get("/responses/{id}", include_in_schema=False)
    @router.delete("/responses/{id}", include_in_schema=False)
    @router.get("/responses/{id}/input_items", include_in_schema=False)
    @router.post("/responses/{id}/cancel", include_in_schema=False)
    async def one_response(id: str) -> Response:
        raise Problem(404, f"there is no response {id[:80]!r}: this server stores none", param="response_id",
                      code="response_not_found")

    @router.get("/models", responses=_CLOSED)
    async def models() -> ModelList:
        return ModelList(data=[asking.model.card(name) for name in asking.model.names])

    @router.get("/models/{name:path}", responses=_CLOSED | _refusals(s404="Unknown model", s4XX="Any other refusal"))
    async def one_model(name: str, request: Request) -> ModelCard:
        if not name:
            raise Problem(404, no_such_path(request), code="not_found")
        return asking.model.card(asking.known(name))

    return router


def _token_routes(asking: _Asking, options: ServerOptions) -> APIRouter:
    key = [Depends(HTTPBearer(auto_error=False))] if options.api_key else []
    router = APIRouter(tags=["vLLM"], dependencies=key, route_class=_GuardedRoute)
    tokens = Tokens(asking.model.tokenizer, asking.model.max_model_len, asking.known, asking._tokenise)
    return refusals(tokens.add_routes(router, _ASKING))


def _house_routes(service: Service[Any], metrics: Metrics | None) -> APIRouter:
    router = APIRouter(tags=["House"])

    @router.get("/health")
    async def health() -> Health:
        """Answers as long as the process does."""
        return Health()

    router.add_api_route("/ping", health, methods=["GET", "POST"], include_in_schema=False)  # SageMaker's name for it

    @router.get("/ready", response_model=Readiness, responses=_refusals(s503="Not ready; Retry-After says when to ask"))
    async def ready() -> Response:
        """200 while requests are answered without delay by a start or a rebuilding."""
        status = service.status()
        now = Readiness(state=status.state, running=status.running, waiting=status.waiting, restarts=status.restarts,
                        last_failure=status.last_failure).model_dump()
        if status.state == "ready":
            return JSONResponse(now)
        because = f" after {status.last_failure}" if status.last_failure else ""
        return Problem(503, f"the service is {status.state}{because}", code=status.state,
                       headers=retry_after(status.retry_after_s)).response(**now)

    @router.get("/version")
    async def version() -> Version:
        return Version(version=VERSION)

    if metrics is not None:
        @router.get("/metrics", response_class=Response,
                    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
        async def prometheus() -> Response:
            content, kind = metrics()
            return Response(content, headers={"content-type": kind})

    return router


# ---- asking the service ----------------------------------------------------------------------------------------------


class _Asking:
    """Takes requests to the service and brings back answers."""

    def __init__(self, service: Service[Any], model: ServedModel, options: ServerOptions) -> None:
        self.model = model
        self._service = service
        self._options = options
        self._forms = Forms(model.tokenizer, options)
        self._limiter: CapacityLimiter | None = None  # they belong to the loop, so they are made there
        self._looking: CapacityLimiter | None = None
        self._said: set[str] = set()

    def known(self, name: str | None) -> str:
        """The model that is asked: the one that there is, where none is named."""
        if not name:
            return self.model.names[0]
        if name not in self.model.names:
            raise Problem(404, f"there is no model {name[:80]!r}; this server has {', '.join(self.model.names)}",
                          param="model", code="model_not_found")
        return name

    async def chat(self, body: ChatRequest, request: Request,
                   told_as: Callable[[Replies], Replies] = lambda replies: replies) -> Response:
        """told_as: what makes the answer of a chat's; by default it is one."""
        model = self.known(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise Problem(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        form = self._forms.of_chat(body)
        replies = for_chat(body, ChatReplies(request_id(request.scope), int(time.time()), model,
                                             spelling(body, self.model.tokenizer), bool(body.logprobs), form),
                           self.model.tokenizer)
        return await self._answer(
            body, request, told_as(replies), [lambda: self._chat_tokens(body, request, form)], "messages", form,
            default=self.model.max_model_len, logprobs=(body.top_logprobs or 0) if body.logprobs else None)

    async def respond(self, body: ResponsesRequest, request: Request) -> Response:
        """As a chat. What it is refused for is told in the words of the request."""
        told = echo(body, self.known(body.model), self.model.sampling)
        for path in body.ignored():
            self._say_once(request, path, body.no_effect[path])
        turns, template = Turns.of(body), self.model.tokenizer.template
        try:
            chat = as_chat(body, turns, lambda name: template is not None and template.reads(name))
            return await self.chat(chat, request, partial(ResponseReplies, request_id(request.scope), told))
        except (Problem, FullpipeError) as error:
            raise turns.blamed(problem_of(error)) from error

    def _chat_tokens(self, body: ChatRequest, request: Request, form: Form) -> list[int]:
        tokenizer, variables = self.model.tokenizer, body.chat_template_kwargs or {}
        tokens = tokenizer.chat([message.plain() for message in body.messages],
                                add_generation_prompt=body.add_generation_prompt, chat_template_kwargs=variables,
                                continue_final_message=bool(body.continue_final_message), tools=form.tools,
                                add_special=bool(body.add_special_tokens))
        form.follow(tokens)
        assert tokenizer.template is not None, "it has just been rendered"
        for name in variables:
            if not tokenizer.template.reads(name):
                self._say_once(request, f"chat_template_kwargs.{name[:60]}",
                               "the model's chat template does not read it")
        return tokens

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        model = self.known(body.model)
        replies = for_text(body, TextReplies(request_id(request.scope), int(time.time()), model,
                                             spelling(body, self.model.tokenizer), body.logprobs is not None),
                           self.model.tokenizer)
        encoders = [self._encoder(prompt, body.add_special_tokens is not False) for prompt in body.prompts()]
        chooses = body.texts() > (body.n or 1)  # by log-probabilities
        return await self._answer(body, request, replies, encoders, "prompt", self._forms.of_text(body),
                                  default=_COMPLETION_TOKENS,
                                  logprobs=0 if chooses and body.logprobs is None else body.logprobs)

    def _encoder(self, prompt: str | list[int], add_special: bool) -> Callable[[], list[int]]:
        if isinstance(prompt, str):
            return lambda: self.model.tokenizer.encode(prompt, add_special=add_special)
        return lambda: self._check_tokens(prompt, "prompt")

    def _check_tokens(self, ids: Iterable[int | str], field: str) -> list[int]:
        tokens = [int(id) for id in ids]
        if (bad := next((token for token in tokens if token not in self.model.tokenizer.tokens), None)) is not None:
            raise Problem(400, f"{field}: the model has no token {bad}", param=field)
        return tokens

    async def _answer(self, body: Options, request: Request, replies: Replies,
                      encoders: Sequence[Callable[[], list[int]]], field: str, form: Form, *, default: int,
                      logprobs: int | None) -> Response:
        """field: what a fault of a prompt is blamed on. default: new tokens at most where the body names no number."""
        for path, why in (*((path, IGNORED[path]) for path in body.ignored()), *form.unheeded):
            self._say_once(request, path, why)
        n, name = body.texts(), "n" if body.texts() == (body.n or 1) else "best_of"
        most = min(self._options.max_choices, self._service.capacity)
        if n * len(encoders) > most:
            raise Problem(400, f"{name}: {n * len(encoders)} texts are asked for; one request may ask for {most}",
                          param=name)
        if body.stream_options is not None and not body.stream:
            raise Problem(400, "stream_options needs stream to be true", param="stream_options")
        answer = Answer(self._service, request.receive)
        try:
            prompts = [kept(body, tokens, self.model.max_model_len) for tokens in
                       await self._tokenise(encoders, field)]
            await self._look_at(form)
            self._check_tokens(body.logit_bias or (), "logit_bias")
            self._check_tokens(body.allowed_token_ids or (), "allowed_token_ids")
            limits = [self._limit(len(tokens), body, field, default) for tokens in prompts]
            check_least(body, limits)
            seed = _base_seed(body, self.model.sampling)
            for number, (tokens, limit) in enumerate(zip(prompts, limits)):
                for i in range(n):
                    self._submit(answer, number, tokens, field, body, form, limit, logprobs, (seed + i) % 2**64)
            log.debug("%s tickets %s", request_id(request.scope), [choice.ticket.id for choice in answer.choices])
            if body.stream:
                first = _checked(await answer.news())
                events = _to_their_end(self._events(body, answer, replies, first, request_id(request.scope)), replies,
                                       request_id(request.scope))
                return EventStream(events, self._options.write_timeout, answer.close)
            while not answer.done:
                for news in _checked(await answer.news()):
                    replies.add(news)
        except ClientGone:
            answer.close()
            return Response(status_code=499)  # nginx's word for it; only the log sees it
        except BaseException:
            answer.close()
            raise
        answer.close()
        return _json(replies.full(answer.choices, usage_of(answer.choices)))

    async def _tokenise(self, encoders: Sequence[Callable[[], list[int]]], field: str) -> list[list[int]]:
        self._limiter = self._limiter or CapacityLimiter(_TOKENISERS)
        try:
            return await anyio.to_thread.run_sync(lambda: [encode() for encode in encoders], limiter=self._limiter)
        except MessageError as error:
            raise Problem(400, told(error), param=error.where) from error
        except (UsageError, UnsupportedModel) as error:  # the latter: a chat template that is none
            raise Problem(400, f"{field}: {told(error)}", param=field) from error

    async def _look_at(self, form: Form) -> None:
        """Have a structure looked at in a thread, where it may take long: they are looked at one after another. The
        service, which says what is wrong with it, is quick then."""
        self._looking = self._looking or CapacityLimiter(1)
        structured = form.changes.get("structured")
        if structured is not None and not is_known(structured, self.model.tokenizer):
            with contextlib.suppress(UsageError, MissingExtra):
                await anyio.to_thread.run_sync(check_structure, structured, self.model.tokenizer, limiter=self._looking)

    def _say_once(self, request: Request, field: str, why: str) -> None:
        """Log that a field has no effect, the first time that anybody sends it."""
        if field not in self._said and len(self._said) < _MOST_SAID:
            self._said.add(field)
            log.warning("%s %r is taken and ignored: %s (said once)", request_id(request.scope), field, why)

    def _limit(self, prompt_tokens: int, body: Options, field: str, default: int) -> int:
        """New tokens at most. A number that is asked for must fit, as with vLLM: a caller who counts on so many should
        not find out from an answer that ends early. The default takes what room there is."""
        context = self.model.max_model_len
        room = context - prompt_tokens
        if not prompt_tokens:
            raise Problem(400, f"{field}: the prompt is empty", param=field)
        if room < 1:
            raise Problem(400, f"{field}: this model's maximum context length is {context} tokens, and the prompt has "
                               f"{prompt_tokens}; at least one must be left for the answer", param=field, code=TOO_LONG)
        name, asked = body.asked_tokens()
        if asked is None:
            return min(int(self.model.sampling.get("max_tokens", default)), room)
        if asked > room:
            raise Problem(400, f"{name} is too large: {asked}. This model's maximum context length is {context} tokens "
                               f"and the prompt has {prompt_tokens} ({asked} > {context} - {prompt_tokens})",
                          param=name, code=TOO_LONG)
        return asked

    def _submit(self, answer: Answer, number: int, tokens: list[int], field: str, body: Options, form: Form, limit: int,
                logprobs: int | None, seed: int) -> None:
        try:
            params = _params(body, self.model.sampling, form, seed=seed, max_tokens=max(limit, 1), logprobs=logprobs)
            answer.submit(number, tokens, params, priority=body.priority or 0,
                          timeout_s=self._options.request_timeout, silent=limit == 0)
        except PromptError as error:
            raise Problem(400, f"{field}: {told(error)}", param=field, code=TOO_LONG) from error
        except (UsageError, MissingExtra) as error:
            if (problem := form.problem_of(error)) is None:
                raise
            raise problem from error

    async def _events(self, body: Options, answer: Answer, replies: Replies, news: list[News],
                      id: str) -> AsyncGenerator[bytes, None]:
        """Server-sent events, all that is new in one piece."""
        options = body.stream_options
        at_end = options is not None and bool(options.include_usage)
        always = at_end and options is not None and bool(options.continuous_usage_stats)
        while True:
            usage = usage_of(answer.choices) if always else None
            lines = [replies.event(chunk) for one in news for chunk in replies.chunks(one, usage)]
            if (problem := _failure(news)) is not None:
                log.warning("%s %s", id, problem.error.message)
                yield "".join([*lines, replies.broken(problem)]).encode()
                return
            if answer.done:
                break
            if lines:
                yield "".join(lines).encode()
            try:
                news = await answer.news()
            except ClientGone:
                log.info("%s closed by the caller", id)
                return
        if at_end:
            lines.append(replies.event(replies.last(usage_of(answer.choices))))
        yield "".join([*lines, replies.end]).encode()


async def _to_their_end(events: AsyncGenerator[bytes, None], replies: Replies,
                        id: str) -> AsyncGenerator[bytes, None]:
    """The events, and where they break off by a mistake of ours an error as the last: a connection that only closes
    looks to some clients like the end of the answer."""
    try:
        async with contextlib.aclosing(events):
            async for piece in events:
                yield piece
    except Exception as error:
        log.exception("%s failed", id)
        yield replies.broken(problem_of(error)).encode()


def _json(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")


def _failure(batch: list[News]) -> Problem | None:
    problems = (failure(news.choice.reason, news.choice.error, news.choice.failure) for news in batch)
    return next((problem for problem in problems if problem is not None), None)


def _checked(batch: list[News]) -> list[News]:
    if (problem := _failure(batch)) is not None:
        raise problem
    return batch


def _base_seed(body: Options, defaults: Mapping[str, Any]) -> int:
    """Seed of the first choice. Who names none gets another text each time, but at temperature 0 nothing is drawn."""
    if body.seed is not None:
        return body.seed % 2**64
    return 0 if _temperature(body, defaults) == 0 else secrets.randbits(63)


def _temperature(body: Options, defaults: Mapping[str, Any]) -> float:
    return float(defaults.get("temperature", 1.0) if body.temperature is None else body.temperature)


def _params(body: Options, defaults: Mapping[str, Any], form: Form, *, seed: int, max_tokens: int,
            logprobs: int | None) -> SamplingParams:
    """What the request says; else the model's defaults; else OpenAI's: temperature 1, no filters, no penalties."""
    named = {name: value for name in ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
                                      "repetition_penalty", "ignore_eos", "skip_special_tokens", "min_tokens",
                                      "include_stop_str_in_output")
             if (value := getattr(body, name)) is not None}
    named = dict(defaults) | named | {"temperature": _temperature(body, defaults), "max_tokens": max_tokens}
    named |= form.changes
    return SamplingParams(
        seed=seed,
        logprobs=logprobs, logit_bias={int(token): value for token, value in (body.logit_bias or {}).items()},
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()), prompt_logprobs=body.scored(),
        bad_words=tuple(body.bad_words or ()),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids), **named)
