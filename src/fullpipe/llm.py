"""The front door in Python: a model that answers prompts.

    from fullpipe import LLM, SamplingParams
    with LLM("qwen2.5-coder-1.5b") as llm:
        for chunk in llm.stream([{"role": "user", "content": "Write a haiku."}]):
            print(chunk.text, end="")

The engine runs in a thread of its own, in a `Service`; what stands here waits for it.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fullpipe.adapting import adapting
from fullpipe.assembly import Assembly, Prepared, assemble
from fullpipe.costs import Machine
from fullpipe.engine import Engine, Listener
from fullpipe.errors import FullpipeError, PipelineError, PromptError, StationFailed, StructureError, UsageError
from fullpipe.models.tokens.messages import is_message
from fullpipe.options import EngineOptions, Options
from fullpipe.pipeline.base import Pipeline
from fullpipe.request import SamplingParams
from fullpipe.service import Asked, Service, Ticket, Update

if TYPE_CHECKING:
    from fullpipe.assembly.hosts import Tell
    from fullpipe.cluster.contact import Contact
    from fullpipe.cluster.placing import Placing
    from fullpipe.models.generation import Generation
    from fullpipe.models.tokens.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""Plain text (continued as it stands), token ids, or chat messages with "role" and "content" (text, parts, or null
with tool calls). As in vLLM also {"prompt": text} and {"prompt_token_ids": ids}."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of one prompt.

    finish_reason: "stop" (end token or stop string), "length", "abort" or "error".
    usage, speculation, timing: as `fullpipe generate --json` prints them; DESIGN section 8 says what the
    figures mean. margins: per token how far it stood above the second best; None without a second or if not asked.
    logprobs: per token its log-probability and those of the likeliest, as (token, logprob) with its own first; empty
    unless `SamplingParams.logprobs` asks for them. prompt_logprobs: the same of the prompt's tokens, None of the first,
    where `SamplingParams.prompt_logprobs` asks.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    usage: dict[str, int]
    speculation: dict[str, Any]
    timing: dict[str, Any]
    margins: list[float | None] = field(default_factory=list)
    logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_logprobs: list[list[tuple[int, float]] | None] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["margins"], values["logprobs"], values["prompt_logprobs"]
        return values


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream. `completion` is set on the last one only."""

    text: str
    token_ids: list[int]
    completion: Completion | None = None


@dataclass(slots=True)
class _Answer:
    """A request that was submitted, and all its news so far. ended: when its last news came.

    Ctrl-C may come between any two operations, so news are never taken out: they stay in a list, and who reads them
    counts how many he has.
    """

    params: SamplingParams
    ticket: Ticket = field(init=False)
    news: list[Update] = field(default_factory=list)
    bell: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)
    begun: float = field(default_factory=time.monotonic)
    ended: float | None = None

    def deliver(self, update: Update) -> None:
        """The engine's thread brings news."""
        if update.reason is not None:
            self.ended = time.monotonic()
        self.news.append(update)
        self.bell.put(None)

    def wait(self, number: int) -> None:
        """Until there are more news than `number`."""
        while len(self.news) <= number:
            self.bell.get()

    def rest(self) -> None:
        """Wait for all its news."""
        while not self.over:
            self.wait(len(self.news))

    @property
    def over(self) -> bool:
        return bool(self.news) and self.news[-1].reason is not None

    def check(self) -> None:
        """Raise an exception of its own where the request ended by a failure: StationFailed if a station failed,
        StructureError where its structure could not be followed to the end, else PipelineError."""
        if not self.over or self.news[-1].reason != "error":
            return
        text, failure = self.news[-1].error or "it failed", self.news[-1].failure
        if isinstance(failure, StructureError):
            raise failure
        hint = failure.hint if isinstance(failure, FullpipeError) else None
        if isinstance(failure, StationFailed) and text.startswith(begins := f"{failure.station} failed: "):
            raise StationFailed(failure.station, text.removeprefix(begins), hint=hint) from failure
        raise PipelineError(text, hint=hint) from failure


class LLM:
    """Answers prompts with a model behind a pipeline.

    model: a catalogue name, a safetensors directory, a GGUF file, or a Hugging Face id.
    options: those of `fullpipe.options`, by name: draft, dtype, stages, method, max_num_seqs, kv_cache_tokens, ...
    Without any the model runs in this process, with a draft where that pays. listeners: called with every event, from
    the engine's thread. progress: called with a line on what takes time.

    Raises UsageError, ModelError and their kin for what cannot be done; StationFailed when a process does not start.
    A process that dies later is replaced, and the texts go on. Where none can be started, or all that are started fail
    again and again, `generate` and `stream` raise PipelineError (StationFailed where it was a station), and Unavailable
    from then on until one has been started. With all stations in this process the first failure is the end.
    """

    def __init__(self, model: str | Path, *, listeners: Iterable[Listener] = (),
                 progress: Callable[[str], None] = lambda line: None, **options: Any) -> None:
        wanted = Options.of(model=str(model), **options)
        self._open(assemble(wanted, progress), wanted.engine, "wall", listeners, progress)
        for line in self.generation.told():
            progress(line)

    @classmethod
    def of(cls, options: Options, *, listeners: Iterable[Listener] = (),
           progress: Callable[[str], None] = lambda line: None, tell: Tell | None = None,
           contact: Contact | None = None) -> Self:
        """The same, with options that were put together before. tell: shown the hosts, where there are several.
        contact: the way to them, if it is not the one that the options name."""
        llm = cls.__new__(cls)
        llm._open(assemble(options, progress, contact=contact, tell=tell), options.engine, "wall", listeners, progress)
        return llm

    @classmethod
    def over(cls, prepared: Prepared, pipeline: Pipeline, *, machine: Machine | None = None,
             engine: EngineOptions | None = None, clock: str = "virtual", listeners: Iterable[Listener] = ()) -> Self:
        """One over a pipeline that was made elsewhere (simulations, tests). machine: what its method is to know of it.
        clock: what `Completion.timing` calls its time."""
        llm = cls.__new__(cls)
        llm._open(Assembly(prepared, pipeline, prepared.method(machine)), engine or prepared.options.engine, clock,
                  listeners)
        return llm

    def _open(self, made: Assembly, engine: EngineOptions, clock: str, listeners: Iterable[Listener],
              progress: Callable[[str], None] = lambda line: None) -> None:
        unshared, engine = made.prepared.unshared(engine), made.prepared.engine_options(engine)
        self._prepared, self._machine, self._clock = made.prepared, made.method.machine, clock
        self._shares_prefixes, self.max_num_seqs = engine.enable_prefix_caching, engine.max_num_seqs
        try:
            if unshared:
                raise UsageError(unshared, hint="Leave `enable_prefix_caching` out, or use another draft.")
            self._service = Service(made.pipeline, made.method, made.prepared, options=engine, rebuild=made.rebuild,
                                    listeners=list(listeners), calibration=made.calibration,
                                    patience_s=made.patience_s)
        except BaseException:
            made.pipeline.close()
            made.close()
            raise
        try:
            short = self._service.check_length(made.prepared.options.model.max_model_len)
        except UsageError:
            self._service.close()
            made.close()
            raise
        if short:
            progress(short)
        self._made, self._adapting = made, adapting(self._service, made)
        self.tokenizer: Tokenizer = made.prepared.tokenizer
        self.max_model_len = self._service.max_model_len
        atexit.register(self.close)

    @property
    def num_stages(self) -> int:
        """Of the pipeline; where there are several hosts this may change."""
        return self._service.engine.pipeline.num_stages

    @property
    def vocab_size(self) -> int:
        """Number of real tokens, padding of the matrices not counted."""
        return self._prepared.vocab_size

    @property
    def dtype(self) -> str:
        """In which numbers the model computes; never "auto"."""
        return self._prepared.target.dtype

    @property
    def generation(self) -> Generation:
        """How the model's files want it sampled."""
        return self._prepared.generation

    @property
    def method(self) -> str:
        """The name of the method."""
        return self._service.engine.method.name

    @property
    def placing(self) -> Placing | None:
        """Who knows the hosts, and decided where the stations sit; None: there is one host."""
        return self._made.hosts.placing if self._made.hosts else None

    # ---- asking ------------------------------------------------------------------------------------------

    def get_default_sampling_params(self, **changes: Any) -> SamplingParams:
        """How it is sampled where nothing is said: as the model's files ask for (`generation_config`), and for what
        they do not say as `SamplingParams` does. changes: fields that differ."""
        return SamplingParams(**{**self.generation.params, **changes})

    def generate(self, prompts: Prompt | Sequence[Prompt],
                 params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[Completion]:
        """Answer one prompt or several, as many at once as `max_num_seqs` says; results in order of the prompts.

        params: for all prompts, or as many as there are prompts; taken as they are. None: those of
        `get_default_sampling_params`. Raises UsageError when the numbers differ.
        When a station fails for good or Ctrl-C comes, the exception's `completions` hold what there is: whole answers,
        and begun ones with the finish reason "error" or "abort".
        """
        asked = _as_prompts(prompts)
        answers = self._submit(asked, self._one_each(params, len(asked)))
        try:
            for one in answers:
                one.rest()
                one.check()
        except (FullpipeError, KeyboardInterrupt) as error:
            self._cancel(answers)
            error.completions = [self._completion(one) for one in answers  # type: ignore[union-attr]
                                 if one.ticket.stats.admitted is not None]
            raise
        return [self._completion(one) for one in answers]

    def chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, *,
             add_generation_prompt: bool | None = None, continue_final_message: bool = False,
             chat_template_kwargs: Mapping[str, Any] | None = None,
             tools: Sequence[Mapping[str, Any]] | None = None) -> Completion:
        """Answer a conversation through the model's chat template. params: as in `generate`.

        continue_final_message: go on with the last message rather than begin an answer, which add_generation_prompt
        stands for (None: unless the last message is continued). chat_template_kwargs: what the template reads besides,
        such as `enable_thinking`. tools: what the model may call, each as in OpenAI's `tools`; its calls are in the
        text, in its own form. All as vLLM has them. `tokenizer.chat` takes the same, for `stream`.
        """
        _check_there_is_something(messages)
        tokens = self.tokenizer.chat(messages, add_generation_prompt=add_generation_prompt,
                                     continue_final_message=continue_final_message,
                                     chat_template_kwargs=chat_template_kwargs, tools=tools)
        return self.generate([tokens], params)[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Chunk, None, None]:
        """Answer one prompt piece by piece; the last chunk carries the completion. params: as in `generate`. Closing
        the generator aborts the request. When a station fails for good or Ctrl-C comes, the last chunk (finish reason
        "error" or "abort") still comes before the exception is raised; who is hit by Ctrl-C between two chunks gets it
        from `throw`."""
        (one,) = self._submit([prompt], [params or self.get_default_sampling_params()])
        told = 0  # news
        try:
            while not told or one.news[told - 1].reason is None:
                one.wait(told)
                update = one.news[told]
                last = self._completion(one) if update.reason else None
                chunk = Chunk(update.text, update.token_ids, last)
                told += 1  # with no call between this and the yield, Ctrl-C does not come between them
                yield chunk
            one.check()
        except KeyboardInterrupt:
            if not told or one.news[told - 1].reason is None:
                self._cancel([one])
                rest = one.news[told:]
                yield Chunk("".join(update.text for update in rest), [id for update in rest for id in update.token_ids],
                            self._completion(one))
            raise
        finally:
            self._cancel([one])

    def use(self, method: str, *, width: int | None = None, depth: int | None = None,
            floor: float | None = None, refresh: bool | None = None) -> None:
        """Change the method; the text stays the same. Model and stages stay loaded.

        width, depth, floor, refresh: None means what the constructor was given, not an earlier `use`; where it was
        given None too, the method's own default. Its depth and refresh count for the methods that have one.

        Raises UsageError as the constructor does, and while a request runs; the method stays as it was then.
        """
        made = self._prepared.method(self._machine, method, width=width, depth=depth, floor=floor, refresh=refresh)
        self._service.call(lambda engine: engine.use(made))

    def close(self) -> None:
        """Free everything; stage processes are ended. May be called more than once."""
        if self._adapting:
            self._adapting.close()
        self._service.close()
        self._made.keep()
        self._made.close()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt of any kind. Raises PromptError when there are none."""
        if isinstance(prompt, Mapping):
            prompt = _unwrapped(prompt)
        _check_there_is_something(prompt)
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special=True)
        if isinstance(prompt[0], int):  # type: ignore[index]
            return list(prompt)  # type: ignore[arg-type]
        return self.tokenizer.chat(list(prompt))  # type: ignore[arg-type]

    # ---- the service -------------------------------------------------------------------------------------

    def _submit(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[_Answer]:
        answers = [_Answer(own) for own in params]
        asked = [Asked(self.encode(prompt), one.params, one.deliver) for prompt, one in zip(prompts, answers)]
        if not self._shares_prefixes and not self._service.busy:  # what an earlier request left would be in the way
            with contextlib.suppress(FullpipeError):  # recovery knows of it, and for these prompts it may go well
                self._service.call(_drain_if_idle)
        for one, ticket in zip(answers, self._service.submit_all(asked)):
            one.ticket = ticket
        return answers

    def _one_each(self, params: SamplingParams | Sequence[SamplingParams] | None, number: int) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.get_default_sampling_params()] * number
        if len(params) != number:
            raise UsageError(f"there are {number} prompts and {len(params)} sampling parameters",
                             hint="Give one SamplingParams for all prompts, or one for each.")
        return list(params)

    def _cancel(self, answers: Sequence[_Answer]) -> None:
        """End those that run, and take in the last that is told of them."""
        open = [one for one in answers if not one.over]
        for one in open:
            self._service.cancel(one.ticket)
        for one in open:
            one.rest()

    def _completion(self, one: _Answer) -> Completion:
        stats, method, news = one.ticket.stats, self._service.engine.method, list(one.news)
        token_ids = [id for update in news for id in update.token_ids]
        spent = (stats.last_token or 0.0) - stats.started
        return Completion(
            "".join(update.text for update in news), token_ids, (news[-1].reason if news else None) or "abort",
            {"prompt_tokens": one.ticket.num_prompt, "completion_tokens": len(token_ids)},
            stats.speculation(method.name, self.num_stages, method.most_nodes) | {"accept": one.params.accept},
            {"clock": self._clock, "ttft_s": stats.ttft_s, "tbt_s": stats.tbt_s,
             "tokens_per_s": stats.num_emitted / spent if stats.num_emitted and spent > 0 else 0.0,
             "wall_s": (one.ended or time.monotonic()) - one.begun},
            [margin for update in news for margin in update.margins],
            [told for update in news for told in update.logprobs],
            [score.told if score else None for update in news for score in update.prompt_logprobs])


def _drain_if_idle(engine: Engine) -> None:
    """Another thread's request may have come meanwhile, and then there is nothing to wait for."""
    if not engine.busy:
        engine.drain()


def _check_there_is_something(prompt: Prompt) -> None:
    """Of a conversation: that somebody says something in the end. An answer that only calls tools says nothing."""
    last = prompt[-1] if prompt else ""  # type: ignore[index]
    said: Any = "tokens"
    if isinstance(last, Mapping) and set(last) <= {"role", "name", "content"}:  # others say more, or are refused
        said = last.get("content", "")
    if not prompt or (isinstance(said, str) and not said.strip()):
        raise PromptError("the prompt is empty", hint="Write something to answer.")


def _unwrapped(prompt: Mapping[str, Any]) -> Prompt:
    """What is in a prompt of vLLM's kind. Raises UsageError where there is neither text nor tokens, or both."""
    found = [prompt[key] for key in _WRAPPERS if prompt.get(key) is not None]
    if len(found) != 1 or set(prompt) - set(_WRAPPERS):
        raise UsageError(f"a prompt cannot be made of {', '.join(map(repr, prompt)) or 'an empty mapping'}",
                         hint="Give a text, a list of token ids, a list of messages, or one of "
                              '{"prompt": text} and {"prompt_token_ids": ids}.')
    return found[0]  # type: ignore[no-any-return]


_WRAPPERS = ("prompt", "prompt_token_ids")


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)) or (prompts and (
            isinstance(prompts[0], int) or (is_message(prompts[0]) and not set(_WRAPPERS) & set(prompts[0])))):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
