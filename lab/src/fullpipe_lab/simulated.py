"""A model whose stages really compute, on an imagined clock: the tokens are real, the machines are not."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from fullpipe.assembly import (
    Target,
    deepens,
    draft_names,
    draft_spec,
    pick_dtype,
    stage_ends,
    stage_specs,
    taps_of,
)
from fullpipe.engine import Engine, Listener
from fullpipe.engine.stats import RequestStats
from fullpipe.errors import UsageError
from fullpipe.hub import resolve
from fullpipe.messages import Emitted, Event, Finished
from fullpipe.methods import WITH_DEPTH, WITH_REFRESH, Method, make_method
from fullpipe.models.tokenizer import Tokenizer
from fullpipe.models.weights import open_model
from fullpipe.options import EngineOptions
from fullpipe.pipeline.inprocess import InProcessPipeline, measured_costs, unit_costs
from fullpipe.request import Request, SamplingParams, fitted
from fullpipe_lab.clusters import Cluster, DraftCosts

Asked = Sequence[int] | Sequence[dict[str, str]]
"""Token ids, or messages for the model's chat template."""


@dataclass(slots=True)
class Said:
    """What became of one prompt. finish: "stop" or "length", None while it runs. stats: in seconds of the virtual
    clock. margins: how far each token stood above the second best, where that was asked for. wall_s: what it took
    here."""

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    finish: str | None = None
    stats: RequestStats | None = None
    wall_s: float = 0.0


class Simulated:
    """A model on imagined devices, ready to answer.

    model, draft: as `LLM` takes them. on: a cluster, or how many stages on links that take nothing. costs: without a
    cluster, "measured" (every stage has a machine like this one to itself) or "unit" (every step takes one second).
    method, width, depth, floor, refresh: see `fullpipe.methods`. at_once: requests that share the stages at a time.
    margins: have them told. threads: compute threads of this process. listeners: are told every event. progress: is
    called with a line on what is being loaded.

    Raises UsageError, ModelError and their kin for what cannot be done, before the first weight is read.
    """

    def __init__(self, model: str, on: Cluster | int, *, draft: str = "auto", method: str = "fullpipe",
                 width: int | None = None, depth: int | None = None, floor: float | None = None,
                 refresh: bool | None = None, costs: Literal["measured", "unit"] = "measured", dtype: str = "auto",
                 threads: int | None = None, at_once: int | None = None, margins: bool = False,
                 listeners: Iterable[Listener] = (), progress: Callable[[str], None] = lambda line: None) -> None:
        self.num_stages = on if isinstance(on, int) else on.num_stages
        self._deepens = deepens(draft)
        self.method = self._method(method, width, depth, floor, refresh)
        path = resolve(model)
        files = open_model(path)
        self.tokenizer, self.dtype = Tokenizer.load(path), pick_dtype(dtype)
        self.vocab_size = min(max(self.tokenizer.tokens) + 1, files.config.vocab_size)  # rows beyond it are padding
        self.max_model_len = files.config.max_positions
        names = draft_names(model, draft) if self.method.needs_draft or draft != "auto" else []
        if self.method.needs_draft and not names:
            raise UsageError(f"the method {method} needs a draft",
                             hint="Name one (a model, or ngram), or use the method pp.")
        target = Target(path, files.config, self.tokenizer, self.dtype, self.vocab_size,
                        stage_ends(files.config, self.num_stages))
        proposer, specs = draft_spec(names, target, progress), stage_specs(target, margins=margins, taps=taps_of(names))
        imagined = _imagined(on, costs, names, files.config.sizes(2 if self.dtype == "bfloat16" else 4).row_bytes)
        progress(f"loading {path.name} as {self.num_stages} stages in {self.dtype}")
        _use_threads(threads)
        self.pipeline = InProcessPipeline([spec.build() for spec in specs], proposer.build() if proposer else None,
                                          clock="virtual", **imagined)
        self._running: dict[int, Said] = {}
        self.engine = Engine(self.pipeline, self.method, options=EngineOptions(max_num_seqs=at_once),
                             listeners=[self._note, *listeners])
        self._asked = 0

    def use(self, method: str, *, width: int | None = None, depth: int | None = None, floor: float | None = None,
            refresh: bool | None = None) -> None:
        """Change the method; the text stays the same. Model and stages stay loaded."""
        self.engine.drain()
        self.method = self._method(method, width, depth, floor, refresh)
        self.engine.use(self.method)

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return list(self.tokenizer.chat(messages))

    def ask(self, prompts: Sequence[Asked], params: SamplingParams) -> list[Said]:
        """Answer prompts, in their order."""
        self.engine.drain()
        asked = [self._submit(prompt, params) for prompt in prompts]
        while self.engine.busy:
            self.engine.step()
        return asked

    def stream(self, prompt: Asked, params: SamplingParams) -> Generator[Said, None, None]:
        """Answer one prompt, and hand it out as it grows, whenever there are new tokens."""
        self.engine.drain()
        said, before = self._submit(prompt, params), 0
        while said.finish is None:
            self.engine.step()
            if len(said.tokens) > before or said.finish is not None:
                before = len(said.tokens)
                yield said

    def close(self) -> None:
        self.pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _method(self, name: str, width: int | None, depth: int | None, floor: float | None,
                refresh: bool | None) -> Method:
        again = self._deepens if refresh is None and name in WITH_REFRESH else refresh
        return make_method(name, width=width, depth=depth if name in WITH_DEPTH else None, floor=floor, refresh=again)

    def _submit(self, prompt: Asked, params: SamplingParams) -> Said:
        tokens = prompt if isinstance(prompt[0], int) else self.encode(prompt)  # type: ignore[arg-type]
        params = fitted(tokens, params, vocab=self.vocab_size, max_model_len=self.max_model_len)  # type: ignore[arg-type]
        eos = frozenset[int]() if params.ignore_eos else self.tokenizer.eos_ids
        request = Request(self._asked, tuple(tokens), params, eos)  # type: ignore[arg-type]
        self._asked += 1
        said = self._running[request.id] = Said(wall_s=-time.perf_counter())
        self.engine.submit(request)
        return said

    def _note(self, event: Event) -> None:
        match event:
            case Emitted():
                said = self._running[event.request]
                said.tokens.append(event.token)
                if event.margin is not None:
                    said.margins.append(event.margin)
            case Finished():
                said = self._running.pop(event.request)
                said.finish, said.stats = event.reason, copy.copy(self.engine.stats.of(event.request))
                said.wall_s += time.perf_counter()


def _imagined(on: Cluster | int, costs: str, drafts: Sequence[str], row_bytes: int) -> dict[str, Any]:
    """The arguments by which a pipeline plays these devices."""
    if isinstance(on, int):
        return {"costs": unit_costs if costs == "unit" else measured_costs,
                "message_bytes": lambda rows: rows * row_bytes}
    asked = DraftCosts(on, drafts)
    asked.check()
    return {"costs": asked, "links": on.links, "message_bytes": on.message_bytes, "device_of": on.device_of}


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
