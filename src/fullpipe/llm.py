"""The front door: a model, cut into stages, answering prompts.

    from fullpipe import LLM, SamplingParams
    with LLM("qwen2.5-coder-1.5b", stages=8) as llm:
        for chunk in llm.stream([{"role": "user", "content": "Write a haiku."}]):
            print(chunk.text, end="")
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from fullpipe.assembly import Assembly, assemble, deepens
from fullpipe.engine.loop import Engine, Listener
from fullpipe.errors import FullpipeError, PromptError, UsageError
from fullpipe.messages import Emitted, Finished
from fullpipe.methods import WITH_DEPTH, WITH_REFRESH, make_policy
from fullpipe.planning.cluster import Cluster
from fullpipe.request import Request, SamplingParams, fitted
from fullpipe.sequences.sequence import Track
from fullpipe.text import Reply

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Plain text (continued as it stands), token ids, or chat messages with "role" and "content"."""

@dataclass(frozen=True, slots=True)
class Completion:
    """What became of one prompt.

    finish_reason: "stop" (end token or stop string), "length", "abort" or "error".
    usage, speculation, timing: as `fullpipe generate --json` prints them; DESIGN section 8 says what the
    figures mean. margins: per token how far it stood above the second best, when asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    usage: dict[str, int]
    speculation: dict[str, Any]
    timing: dict[str, Any]
    margins: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["margins"]
        return values


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream. `completion` is set on the last one only."""

    text: str
    token_ids: list[int]
    completion: Completion | None = None


@dataclass(slots=True)
class _Running:
    """A request that has been submitted: its track, its text so far, what the engine said of its end."""

    track: Track
    reply: Reply
    begun: float
    margins: list[float] = field(default_factory=list)
    reason: str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.track.tokens) - self.track.num_prompt

    def tokens(self, first: int = 0) -> list[int]:
        """What was emitted, from the track: there it stands even when the step that emitted it raised."""
        return self.track.tokens[self.track.num_prompt + first :]


class LLM:
    """A model behind a pipeline of stages, ready to answer.

    model: a catalogue name, a safetensors directory, a GGUF file, or a Hugging Face id.
    draft: "auto" (n-gram, and the catalogue's partner of the model if it has one), "none", "ngram", a model as
    above, "spd:DIR" or "exit:DIR" (a draft module, docs/train-a-draft-module.md), or several of them with commas
    between, whose guesses are merged.
    stages: how many. method, width, depth, floor, refresh: see `fullpipe.methods`; None is the method's own,
    and for refresh: whether the draft has a pipeline draft module (spd:DIR), which answers better when asked again.
    dtype: "float32", "bfloat16", or "auto" (bfloat16 where the processor computes in it).
    pipeline: "inprocess" (all stages here) or "distributed" (a process per stage).
    clock: for in-process runs, "virtual" (as if every stage had a machine like this one to itself) or "wall".
    costs: on the virtual clock, "measured", or "unit" (every stage step and draft call takes one second).
    link_ms, link_mbit: one-way latency in milliseconds, and megabits per second (None: unlimited), of every hop from
    stage to stage and from the last one back to the engine, which sits with stage 0 and the draft. In virtual time,
    or emulated between the processes of a distributed pipeline.
    pace: seconds that the stations of a distributed pipeline take at least, {"stage 0": {rows: seconds}, ...}.
    threads: compute threads (in-process: of this process; distributed: of each stage; None: all, and one).
    timeout: seconds without progress after which a station of a distributed pipeline counts as hung.
    start_timeout: seconds that the processes of a distributed pipeline may take to start, loading included.
    max_num_seqs: prompts of one `generate` that share the pipeline at a time.
    cluster: a `Cluster`, or a TOML file or preset that describes devices and links (docs/clusters.md), and says how
    many stages there are. In process the stages run on its virtual time; a distributed pipeline emulates its links, and
    its stages take at least its devices' times.
    listeners: called with every event. progress: called with a line on what is being loaded.

    Raises UsageError, ModelError and their kin for what cannot be done; StationFailed when a process dies.
    """

    def __init__(self, model: str, *, draft: str = "auto", stages: int = 8, method: str = "fullpipe",
                 width: int | None = None, depth: int | None = None, floor: float | None = None,
                 refresh: bool | None = None, dtype: str = "auto",
                 pipeline: Literal["inprocess", "distributed"] = "inprocess",
                 clock: Literal["virtual", "wall"] = "virtual", costs: Literal["measured", "unit"] = "measured",
                 link_ms: float = 0.0, link_mbit: float | None = None,
                 pace: Mapping[str, Mapping[Any, float]] | None = None, threads: int | None = None,
                 timeout: float = 60.0, start_timeout: float = 300.0, max_model_len: int | None = None,
                 max_num_seqs: int = 1, margins: bool = False, cluster: str | Path | Cluster | None = None,
                 listeners: Iterable[Listener] = (), progress: Callable[[str], None] | None = None) -> None:
        imagined = Cluster.load(cluster) if isinstance(cluster, (str, Path)) else cluster
        stages = imagined.num_stages if imagined is not None else stages
        policy = make_policy(method, width=width, depth=depth, floor=floor,
                             refresh=refresh)  # refuse before anything is loaded
        self._width, self._depth, self._floor = width, depth, floor
        self._refresh = deepens(draft) if refresh is None else refresh
        if refresh is None and method in WITH_REFRESH:
            policy = make_policy(method, width=width, depth=depth, floor=floor, refresh=self._refresh)
        if max_num_seqs < 1:
            raise UsageError(f"max_num_seqs must be 1 or more (got {max_num_seqs})")
        self._assembly: Assembly = assemble(
            model, draft=draft, stages=stages, method=policy.name, needs_draft=policy.needs_draft, dtype=dtype,
            pipeline=pipeline, clock=clock, costs=costs, link_ms=link_ms, link_mbit=link_mbit, pace=pace,
            threads=threads, max_model_len=max_model_len, margins=margins, timeout=timeout, start_timeout=start_timeout,
            progress=progress or (lambda line: None), cluster=imagined)
        self.tokenizer = self._assembly.tokenizer
        self.max_model_len = self._assembly.max_model_len
        self.num_stages = stages
        self.max_num_seqs = max_num_seqs
        self._engine = Engine(self._assembly.pipeline, policy, listeners=listeners)  # the draft has been checked
        self._ids = count()

    @property
    def vocab_size(self) -> int:
        """Number of real tokens, padding of the matrices not counted."""
        return self._assembly.vocab_size

    # ---- asking ------------------------------------------------------------------------------------------

    def generate(self, prompts: Prompt | Sequence[Prompt],
                 params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[Completion]:
        """Answer one prompt or several; results in order of the prompts.

        params: for all prompts, or as many as there are prompts. Raises UsageError when the numbers differ.
        When a station fails or Ctrl-C comes, the exception's `completions` hold what there is: whole answers,
        and begun ones with the finish reason "error" or "abort".
        """
        asked = self._as_prompts(prompts)
        requests = [self._request(prompt, own) for prompt, own in zip(asked, _one_each(params, len(asked)))]
        done: dict[int, Completion] = {}
        running: dict[int, _Running] = {}
        pending = deque(requests)
        self._engine.drain()
        try:
            while pending or running:
                while pending and len(running) < self.max_num_seqs:
                    request = pending.popleft()
                    running[request.id] = self._start(request)
                self._step(running)
                for id in [id for id, one in running.items() if one.reason]:
                    done[id] = self._completion(running.pop(id))
        except (FullpipeError, KeyboardInterrupt) as error:
            for id, one in running.items():
                one.reason = one.track.finished or ("abort" if isinstance(error, KeyboardInterrupt) else "error")
                done[id] = self._completion(one)
            error.completions = [done[request.id] for request in requests if request.id in done]  # type: ignore
            raise
        finally:
            for id in running:
                self._engine.abort(id)
        return [done[request.id] for request in requests]

    def chat(self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None) -> Completion:
        """Answer a conversation through the model's chat template."""
        return self.generate([messages], params)[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Chunk, None, None]:
        """Answer one prompt piece by piece; the last chunk carries the completion. Closing the generator
        aborts the request. When a station fails or Ctrl-C comes, the last chunk (finish reason "error" or
        "abort") still comes before the exception is raised; who is hit by Ctrl-C between two chunks gets it
        from `throw`."""
        request = self._request(prompt, params or SamplingParams())
        self._engine.drain()
        one = self._start(request)
        running = {request.id: one}
        sent, last = 0, False
        try:
            while one.reason is None:
                self._step(running)
                text = one.reply.fresh()
                if one.reason is None and (text or one.num_tokens > sent):
                    first, sent = sent, one.num_tokens
                    yield Chunk(text, one.tokens(first))
                elif one.reason is not None:
                    completion, last = self._completion(one), True
                    yield Chunk(text + one.reply.fresh(), one.tokens(sent), completion)
        except (FullpipeError, KeyboardInterrupt) as error:
            if not last:
                one.reason = one.track.finished or ("abort" if isinstance(error, KeyboardInterrupt) else "error")
                completion, last = self._completion(one), True
                yield Chunk(one.reply.fresh(), one.tokens(sent), completion)
            raise
        finally:
            self._engine.abort(request.id)

    def use(self, method: str, *, width: int | None = None, depth: int | None = None,
            floor: float | None = None, refresh: bool | None = None) -> None:
        """Change the method; the text stays the same. Model and stages stay loaded.

        width, depth, floor, refresh: None means what the constructor was given, not an earlier `use`; where it was
        given None too, the method's own default. Its depth and refresh count for the methods that have one.

        Raises UsageError as the constructor does; the method stays as it was then.
        """
        self._engine.use(make_policy(
            method, width=self._width if width is None else width,
            depth=self._depth if depth is None and method in WITH_DEPTH else depth,
            floor=self._floor if floor is None else floor,
            refresh=self._refresh if refresh is None and method in WITH_REFRESH else refresh))

    def close(self) -> None:
        """Free everything; stage processes are ended. May be called more than once."""
        self._assembly.pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    # ---- the way in and out ------------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt of any kind. Raises PromptError when there are none."""
        if isinstance(prompt, str):
            if not prompt:
                raise PromptError("the prompt is empty", hint="Write something to answer.")
            return self.tokenizer.encode(prompt, add_special=True)
        if not prompt:
            raise PromptError("the prompt is empty", hint="Write something to answer.")
        if isinstance(prompt[0], int):
            return list(prompt)  # type: ignore[arg-type]
        messages: list[Mapping[str, str]] = list(prompt)  # type: ignore[arg-type]
        if not str(messages[-1].get("content", "")).strip():
            raise PromptError("the prompt is empty", hint="Write something to answer.")
        return self.tokenizer.chat(messages)

    @staticmethod
    def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], (int, Mapping))):
            return [prompts]  # type: ignore[list-item]
        return list(prompts)  # type: ignore[arg-type]

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        tokens = self.encode(prompt)
        params = fitted(tokens, params, vocab=self._assembly.vocab_size, max_model_len=self.max_model_len)
        eos = frozenset() if params.ignore_eos else self.tokenizer.eos_ids
        return Request(next(self._ids), tuple(tokens), params, eos)

    def _start(self, request: Request) -> _Running:
        reply = Reply(self.tokenizer.stream(), request.params.stop)
        begun = time.monotonic()
        return _Running(self._engine.submit(request, reply.judge), reply, begun)

    def _step(self, running: dict[int, _Running]) -> None:
        for event in self._engine.step():
            one = running.get(event.request)
            if one is None:
                continue
            if isinstance(event, Emitted) and event.margin is not None:
                one.margins.append(event.margin)
            elif isinstance(event, Finished):
                one.reason = event.reason

    def _completion(self, one: _Running) -> Completion:
        one.reply.finish()
        stats, prompt = one.track.stats, one.track.request.prompt
        spent = (stats.last_token or 0.0) - stats.started
        return Completion(
            one.reply.text, one.tokens(), one.reason or "abort",
            {"prompt_tokens": len(prompt), "completion_tokens": one.num_tokens},
            stats.speculation(self._engine.policy.name, self.num_stages, self._engine.policy.width)
            | {"accept": one.track.request.params.accept},
            {"clock": self._assembly.clock, "ttft_s": stats.ttft_s, "tbt_s": stats.tbt_s,
             "tokens_per_s": stats.num_emitted / spent if stats.num_emitted and spent > 0 else 0.0,
             "wall_s": time.monotonic() - one.begun},
            one.margins)


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, number: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * number
    if len(params) != number:
        raise UsageError(f"there are {number} prompts and {len(params)} sampling parameters",
                         hint="Give one SamplingParams for all prompts, or one for each.")
    return list(params)
