"""Models whose stages really compute: on an imagined clock, where only the tokens are real, or on the wall clock."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, Self

from fullpipe.assembly import Prepared, assemble, measured, prepare, start
from fullpipe.cluster.contact import Contact
from fullpipe.costs import Machine
from fullpipe.engine import Engine, Listener, RequestStats
from fullpipe.events import Emitted, Finished
from fullpipe.messages import Event
from fullpipe.options import EngineOptions, Options
from fullpipe.pipeline.base import Pipeline
from fullpipe.pipeline.durations import measured_costs, unit_costs
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import Request, SamplingParams, fitted
from fullpipe_lab.clusters import Cluster, DraftCosts, machine_of

Costs = Literal["measured", "unit"]
Say = Callable[[str], None]


def _silent(line: str) -> None:
    pass


@dataclass(slots=True)
class Said:
    """What became of one prompt. stats: in seconds of the pipeline's clock. finish: "stop" or "length", None while it
    runs. margins: how far each token stood above the second best; None without a second, or where it was not
    asked. wall_s: what it took here."""

    stats: RequestStats
    tokens: list[int] = field(default_factory=list)
    margins: list[float | None] = field(default_factory=list)
    finish: str | None = None
    wall_s: float = 0.0


class Asker:
    """A model behind an engine of our own, to be asked by token ids: what `LLM` does, with every event in reach.

    machine: what methods are to know of the stations. at_once: requests that share the stages. listeners: are told
    every event.
    """

    def __init__(self, prepared: Prepared, pipeline: Pipeline, *, machine: Machine | None = None,
                 at_once: int | None = None, listeners: Iterable[Listener] = ()) -> None:
        self.prepared, self.pipeline, self._machine = prepared, pipeline, machine
        self.method = prepared.method(machine)
        self.engine = Engine(pipeline, self.method, options=EngineOptions(max_num_seqs=at_once),
                             listeners=[self._note, *listeners])
        self._running: dict[int, Said] = {}
        self._asked = 0

    @property
    def num_stages(self) -> int:
        return len(self.prepared.stages)

    def use(self, method: str, **options: Any) -> None:
        """Change the method; the text stays the same. Model and stages stay loaded."""
        self.engine.drain()
        self.method = self.prepared.method(self._machine, method, **options)
        self.engine.use(self.method)

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, through the model's chat template."""
        return list(self.prepared.tokenizer.chat(messages))

    def ask(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Said]:
        """Answer prompts of token ids, in their order."""
        self.engine.drain()
        asked = [self._submit(prompt, params) for prompt in prompts]
        while self.engine.busy:
            self.engine.step()
        return asked

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Generator[Said, None, None]:
        """Answer one prompt, and hand out what was said whenever there is more of it."""
        self.engine.drain()
        said, before = self._submit(prompt, params), 0
        while said.finish is None:
            self.engine.step()
            if len(said.tokens) > before or said.finish is not None:
                before = len(said.tokens)
                yield said

    def close(self) -> None:
        """Free everything."""
        self.pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _submit(self, prompt: Sequence[int], params: SamplingParams) -> Said:
        prepared = self.prepared
        params = fitted(prompt, params, vocab=prepared.vocab_size, max_model_len=prepared.max_model_len,
                        special=prepared.tokenizer.special)
        eos = frozenset[int]() if params.ignore_eos else prepared.tokenizer.eos_ids
        begun = time.perf_counter()
        self.engine.submit(Request(self._asked, tuple(prompt), params, eos))
        said = self._running[self._asked] = Said(self.engine.stats.of(self._asked), wall_s=-begun)
        self._asked += 1
        return said

    def _note(self, event: Event) -> None:
        match event:
            case Emitted():
                said = self._running[event.request]
                said.tokens.append(event.token)
                said.margins.append(event.margin)
            case Finished():
                said = self._running.pop(event.request)
                said.finish, said.stats = event.reason, copy.copy(said.stats)  # what lands later is not counted
                said.wall_s += time.perf_counter()


class Simulated(Asker):
    """A model on imagined devices.

    on: a cluster, or how many stages on links that take nothing. costs: without a cluster, "measured" (every stage has
    a machine like this one to itself) or "unit" (every step takes one second). progress: told what is being loaded.

    Raises UsageError, ModelError and their kin for what cannot be done, before the first weight is read.
    """

    def __init__(self, options: Options, on: Cluster | int, *, costs: Costs = "measured", at_once: int | None = None,
                 listeners: Iterable[Listener] = (), progress: Say = _silent) -> None:
        stages = on if isinstance(on, int) else on.num_stages
        prepared = prepare(options.having(stages=stages), progress)
        imagined = _imagined(on, costs, prepared.drafts, prepared.row_bytes)
        progress(f"loading {prepared.target.path.name} as {stages} stages in {prepared.target.dtype}")
        if threads := options.pipeline.threads:
            import torch

            torch.set_num_threads(threads)
        pipeline = InProcessPipeline(*prepared.build(), clock="virtual", **imagined)
        machine = None if isinstance(on, int) else machine_of(on, prepared.drafts)
        super().__init__(prepared, pipeline, machine=machine, at_once=at_once, listeners=listeners)


class Real(Asker):
    """A model on stage processes of this machine, or on one stage in this process, on the wall clock.

    Raises as `Simulated` does, and StationFailed.
    """

    def __init__(self, options: Options, *, progress: Say = _silent) -> None:
        prepared = prepare(options, progress)
        pipeline = start(prepared, progress)
        super().__init__(prepared, pipeline, machine=measured(prepared, pipeline, progress))


class Placed(Asker):
    """A model on stages that a plan has put on several hosts, on the wall clock.

    options: with `hosts`. contact: the way to them, if it is not the one that the options name.

    Raises as `Real` does.
    """

    def __init__(self, options: Options, *, contact: Contact | None = None, listeners: Iterable[Listener] = (),
                 progress: Say = _silent) -> None:
        self._made = made = assemble(options, progress, contact=contact)
        assert made.hosts and made.hosts.placing.plan, "the options name no hosts"
        self.placing, self.plan = made.hosts.placing, made.hosts.placing.plan
        # A method asks how many stages there are, and prepared before the plan there is one description for all.
        prepared = replace(made.prepared, stages=made.prepared.stages * made.pipeline.num_stages)
        super().__init__(prepared, made.pipeline, machine=made.hosts.machine, listeners=listeners)

    def close(self) -> None:
        super().close()
        self._made.close()


def _imagined(on: Cluster | int, costs: Costs, drafts: Sequence[str], row_bytes: int) -> dict[str, Any]:
    """The arguments by which a pipeline plays these devices."""
    if isinstance(on, int):
        return {"costs": unit_costs if costs == "unit" else measured_costs,
                "message_bytes": lambda rows: rows * row_bytes}
    asked = DraftCosts(on, drafts)
    asked.check()
    return {"costs": asked, "links": on.links, "message_bytes": on.message_bytes, "device_of": on.device_of}
