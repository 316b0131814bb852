"""One generator puts load on any OpenAI-compatible server, and says what that did to the answers. No torch.

    server = Server("http://127.0.0.1:8000", "smollm2-135m")
    result = run_load(server, bundled(), Traffic(concurrency=8, max_tokens=64))
    print(result.summary().tokens_per_s)

Wall-clock times, taken where the answers arrive. Tokens are counted by the server's `usage`; times between them are
seen by chunk, and a chunk may bring several.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice, pairwise
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fullpipe.errors import UsageError
from fullpipe.prompts import FilePrompt
from fullpipe.server.openai_stream import Endpoint, Server, ask, body_of, require_httpx
from fullpipe.threads import beside

if TYPE_CHECKING:
    import httpx

_LOOK_S = 0.05  # between two looks whether the load is still wanted

Progress = Callable[[int, int, str], None]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Says how requests come, and what they ask for. Either `concurrency` or `rate` is set.

    concurrency: so many are under way at any time until all are answered (closed loop). rate: requests per second that
    arrive at random, as a Poisson process drawn from `seed`, whether answers come or not (open loop). seed: of the
    sampling, too. ignore_eos: go on to max_tokens past the model's own end; for servers that know the field.
    limit_s: seconds that one answer may take. extra: more fields of each request, over those that are made here.
    """

    concurrency: int | None = None
    rate: float | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 7
    ignore_eos: bool = False
    endpoint: Endpoint = "chat"
    limit_s: float = 600.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise UsageError("load has either a concurrency or a rate", hint="Give `concurrency` or `rate`, not both.")
        if (self.concurrency is not None and self.concurrency < 1) or (self.rate is not None and not self.rate > 0):
            raise UsageError("the concurrency must be 1 or more, and the rate above 0",
                             hint="For example `concurrency=8`, or `rate=0.5`.")

    @property
    def options(self) -> dict[str, Any]:
        """The request's fields beside model and prompt."""
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed,
                **({"ignore_eos": True} if self.ignore_eos else {}), **self.extra}

    def arrivals(self, count: int) -> list[float]:
        """Seconds at which requests of the open loop are due, since its beginning; the first at once."""
        assert self.rate is not None
        stream, now, times = random.Random(self.seed), 0.0, []
        for _ in range(count):
            times.append(now)
            now += stream.expovariate(self.rate)
        return times


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class LoadSample(_Part):
    """Tells how one request went. index: its place in the order in which they were to be sent. prompt: the prompt's id.

    sent_s: seconds since the load began; late_s: of them, seconds after it was due (open loop; the generator's own
    lag). arrivals, end_s: seconds since it was sent (`openai_stream.Answer` says of what). error: the kind of failure,
    None for a whole answer; such a sample counts as failed and in no time.
    """

    index: Count
    prompt: str
    sent_s: Seconds
    late_s: Seconds
    arrivals: list[Seconds]
    end_s: Seconds
    prompt_tokens: Count | None
    tokens: Count | None
    finish: str | None
    text: str
    error: str | None
    detail: str

    @property
    def ttft_s(self) -> float | None:
        """Until the first text; None for an answer without any."""
        return self.arrivals[0] if self.arrivals else None

    @property
    def tbt_s(self) -> float | None:
        """Mean time between tokens, from the first chunk's arrival to the last one's; None with fewer than two."""
        if self.tokens is None or self.tokens < 2 or not self.arrivals:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Between one chunk with text and the next, seconds."""
        return [later - sooner for sooner, later in pairwise(self.arrivals)]


@dataclass(frozen=True, slots=True)
class Spread:
    """Summarises `count` values. Between two of them, percentiles are interpolated."""

    count: int
    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None of no values; those that are None do not count."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(len(known), *(float(value) for value in np.percentile(known, (50, 90, 99))))


@dataclass(frozen=True, slots=True)
class Summary:
    """Sums up a load. Rates are of whole answers, over `span_s`: seconds from the first request's sending to the last
    one's end.

    ttft_s: until the first text. tbt_s: each answer's mean time between tokens. gap_s: between chunks, over all
    answers. latency_s: until the end. failures: how many of each kind.
    """

    answered: int
    failed: int
    failures: dict[str, int]
    tokens: int
    span_s: float
    requests_per_s: float
    tokens_per_s: float
    ttft_s: Spread | None
    tbt_s: Spread | None
    gap_s: Spread | None
    latency_s: Spread | None


class LoadResult(_Part):
    """Holds a load and its samples, in order of sending. client_cpu_s: processor time that the generator itself took.

    asked: requests that were to be sent; an interrupted load has fewer samples.
    """

    url: str
    model: str
    endpoint: Endpoint
    concurrency: Annotated[int, Field(ge=1)] | None
    rate: Annotated[float, Field(gt=0)] | None
    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool
    extra: dict[str, Any] = Field(default_factory=dict)
    asked: Count
    interrupted: bool
    client_cpu_s: Seconds
    samples: list[LoadSample]

    @property
    def whole(self) -> list[LoadSample]:
        return [sample for sample in self.samples if sample.error is None]

    @property
    def span_s(self) -> float:
        if not self.samples:
            return 0.0
        return max(one.sent_s + one.end_s for one in self.samples) - min(one.sent_s for one in self.samples)

    def summary(self) -> Summary:
        whole, span = self.whole, self.span_s
        tokens = sum(one.tokens or 0 for one in whole)
        failures = Counter(one.error for one in self.samples if one.error is not None)
        return Summary(
            answered=len(whole), failed=len(self.samples) - len(whole), failures=dict(failures.most_common()),
            tokens=tokens, span_s=span, requests_per_s=len(whole) / span if span else 0.0,
            tokens_per_s=tokens / span if span else 0.0, ttft_s=Spread.of(one.ttft_s for one in whole),
            tbt_s=Spread.of(one.tbt_s for one in whole), gap_s=Spread.of(gap for one in whole for gap in one.gaps),
            latency_s=Spread.of(one.end_s for one in whole))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, every raw sample in it."""
        return {**self.model_dump(exclude={"samples"}), "summary": asdict(self.summary()),
                "samples": [sample.model_dump() for sample in self.samples]}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Self:
        """What `to_dict` made; the summary is computed anew. Raises ValidationError for anything else."""
        return cls.model_validate({key: part for key, part in value.items() if key != "summary"})


# ---- the prompts -------------------------------------------------------------------------------------------


def take(prompts: Sequence[FilePrompt], count: int | None) -> list[FilePrompt]:
    """So many of them, from the beginning again where there are too few; None: each once."""
    return list(islice(cycle(prompts), len(prompts) if count is None else count))


def distinct(prompts: Sequence[FilePrompt], tag: str) -> list[FilePrompt]:
    """The prompts with "[tag.place]" before the text: then a server that keeps the caches of what it has answered finds
    nothing of one in the others, nor in those of another tag. Deterministic."""
    return [replace(one, id=f"{one.id}[{tag}.{place}]", turns=(f"[{tag}.{place}] {one.text}",))
            for place, one in enumerate(prompts)]


# ---- the load ----------------------------------------------------------------------------------------------


def run_load(server: Server, prompts: Sequence[FilePrompt], traffic: Traffic,
             progress: Progress | None = None) -> LoadResult:
    """Ask the first turn of every prompt. Failures are samples.

    progress: called after each answer with how many there are, how many there will be, and how it ended; in another
    thread. Raises MissingExtra without httpx. When Ctrl-C comes, the exception's `load` is the result of what has ended
    until then.
    """
    require_httpx()
    run = _Run(server, prompts, traffic, progress or (lambda done, total, subject: None))
    cpu = time.process_time()

    def result(interrupted: bool) -> LoadResult:
        return LoadResult(
            url=server.url, model=server.model, endpoint=traffic.endpoint, concurrency=traffic.concurrency,
            rate=traffic.rate, max_tokens=traffic.max_tokens, temperature=traffic.temperature, seed=traffic.seed,
            ignore_eos=traffic.ignore_eos, extra=dict(traffic.extra), asked=len(prompts), interrupted=interrupted,
            client_cpu_s=time.process_time() - cpu, samples=sorted(run.samples, key=lambda one: one.index))

    try:
        beside(lambda: asyncio.run(run.until_stopped()), stop=run.stop)
    except KeyboardInterrupt as interrupt:
        interrupt.load = result(interrupted=True)  # type: ignore[attr-defined]
        raise
    return result(interrupted=False)


class _Run:
    """Runs one load."""

    def __init__(self, server: Server, prompts: Sequence[FilePrompt], traffic: Traffic, progress: Progress) -> None:
        self._server, self._prompts, self._traffic, self._progress = server, prompts, traffic, progress
        self._begun = 0.0
        self._wanted = [True]
        self.samples: list[LoadSample] = []

    def stop(self) -> None:
        """May be called from any thread."""
        self._wanted.clear()

    async def until_stopped(self) -> None:
        load = asyncio.create_task(self.all())
        while self._wanted and not load.done():
            await asyncio.wait([load], timeout=_LOOK_S)
        if not load.done():
            load.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await load

    async def all(self) -> None:
        import httpx

        # Nothing but the server may hold a request up: no limit on connections, and time is limited per answer.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client:
            self._begun = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                if self._traffic.rate is None:
                    self._closed(client, group)
                else:
                    await self._open(client, group)

    def _closed(self, client: httpx.AsyncClient, group: asyncio.TaskGroup) -> None:
        waiting = iter(range(len(self._prompts)))

        async def one_after_another() -> None:
            for index in waiting:
                await self._one(client, index)

        for _ in range(min(self._traffic.concurrency or 1, len(self._prompts))):
            group.create_task(one_after_another())

    async def _open(self, client: httpx.AsyncClient, group: asyncio.TaskGroup) -> None:
        for index, due in enumerate(self._traffic.arrivals(len(self._prompts))):
            await asyncio.sleep(max(due - self._now(), 0.0))
            group.create_task(self._one(client, index, due))

    async def _one(self, client: httpx.AsyncClient, index: int, due: float | None = None) -> None:
        prompt, traffic = self._prompts[index], self._traffic
        body = body_of(self._server, traffic.endpoint, prompt.text, traffic.options)
        sent = self._now()
        answer = await ask(client, self._server, traffic.endpoint, body, traffic.limit_s)
        late = max(sent - due, 0.0) if due is not None else 0.0
        self.samples.append(LoadSample(index=index, prompt=prompt.id, sent_s=sent, late_s=late, **asdict(answer)))
        self._progress(len(self.samples), len(self._prompts), answer.error or "ok")

    def _now(self) -> float:
        return time.perf_counter() - self._begun
