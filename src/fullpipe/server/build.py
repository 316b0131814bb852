"""From options to a running engine, as often as it has to be built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fullpipe.assembly import assemble, deepens
from fullpipe.batching import Balanced, Batching, CostCurve, Dynamic, Equal, Separate
from fullpipe.cluster.calibrate import cost_curves
from fullpipe.engine.loop import Engine, Listener
from fullpipe.errors import UsageError
from fullpipe.methods import WITH_REFRESH, Policy, make_policy
from fullpipe.models.tokenizer import Tokenizer
from fullpipe.service import Started
from fullpipe.stations.drafts.names import module_folder

BATCHINGS = ("auto", "dynamic", "balanced", "equal", "separate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    """Call it with listeners. The options are those of `LLM` and of `fullpipe serve`.

    batching: one of `BATCHINGS`; "auto" is dynamic with the method fullpipe, balanced with pp, else separate.
    kv_slots: cache slots of all requests together, on each stage. share_prefixes: off with draft modules, whose taps
    of rows that are not computed would never come. prefill_share: see `batching.Dynamic`.

    Raises UsageError for what cannot be done, when it is made; what building raises, when it is called.
    """

    model: str
    draft: str = "auto"
    stages: int = 2
    method: str = "fullpipe"
    batching: str = "auto"
    width: int | None = None
    dtype: str = "auto"
    pipeline: Literal["inprocess", "distributed"] = "distributed"
    max_num_seqs: int = 16
    max_model_len: int | None = None
    kv_slots: int = 65536
    share_prefixes: bool = True
    prefill_share: float = 1.0
    timeout: float = 30.0
    start_timeout: float = 300.0
    threads: int | None = None
    say: Callable[[str], None] = lambda line: None
    _costs: list[tuple[CostCurve, CostCurve | None]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batching not in BATCHINGS:
            raise UsageError(f"unknown batching {self.batching!r}", hint=f"Known are: {', '.join(BATCHINGS)}.")
        if self.batching == "dynamic" and self.method != "fullpipe":
            raise UsageError(f"dynamic batching chooses among the nodes itself and goes with the method fullpipe, not "
                             f"{self.method}", hint="Use separate, equal or balanced.")
        if self.max_num_seqs < 1 or self.kv_slots < 1 or self.prefill_share <= 0:
            raise UsageError("max_num_seqs and kv_slots must be 1 or more, and prefill_share above 0")
        self._policy()

    def __call__(self, listeners: Sequence[Listener]) -> Started[Tokenizer]:
        policy = self._policy()
        made = assemble(
            self.model, draft=self.draft, stages=self.stages, method=self.method, needs_draft=policy.needs_draft,
            dtype=self.dtype, pipeline=self.pipeline, clock="wall", costs="measured", link_ms=0.0, link_mbit=None,
            pace=None, threads=self.threads, max_model_len=self.max_model_len, margins=False, timeout=self.timeout,
            start_timeout=self.start_timeout, progress=self.say)
        try:
            engine = Engine(made.pipeline, policy, max_num_seqs=self.max_num_seqs, kv_slots=self.kv_slots,
                            share_prefixes=self.share_prefixes and not self._taps)
            engine.batching = self._make_batching(engine)
            engine.listen(listeners)
            longest = self._fitting(made.max_model_len, engine)
        except BaseException:
            made.pipeline.close()
            raise
        return Started(engine, made.tokenizer, made.vocab_size, longest)

    def _fitting(self, max_model_len: int, engine: Engine) -> int:
        """What of the model's length the cache can hold. Raises UsageError where it was asked for and cannot."""
        longest = max_model_len if engine.longest is None else min(engine.longest, max_model_len)
        if longest < 2 or (self.max_model_len is not None and longest < max_model_len):
            raise UsageError(f"{self.kv_slots} cache slots hold {longest} tokens and the guesses beside them, not "
                             f"{max_model_len}", hint="Give more --kv-cache-tokens, or a smaller --max-model-len.")
        if longest < max_model_len:
            self.say(f"the cache holds {longest} tokens of a text, the model {max_model_len}: longer ones are refused "
                     f"(--kv-cache-tokens)")
        return longest

    @property
    def _taps(self) -> bool:
        return any(module_folder(name.strip()) for name in self.draft.split(","))

    def _policy(self) -> Policy:
        options: dict[str, Any] = {"refresh": deepens(self.draft)} if self.method in WITH_REFRESH else {}
        return make_policy(self.method, width=self.width, **options)

    def _make_batching(self, engine: Engine) -> Batching:
        name = self.batching
        if name == "auto":
            name = {"fullpipe": "dynamic", "pp": "balanced"}.get(self.method, "separate")
        match name:
            case "balanced":
                return Balanced(self.stages)
            case "equal":
                return Equal(engine.policy.width)
            case "dynamic":
                if not self._costs:  # stations that replace failed ones cost the same, and callers wait for them
                    self.say("measuring what rows cost")
                    self._costs.append(cost_curves(engine, draft=not self._taps))
                costs, draft_costs = self._costs[0]
                return Dynamic(costs, num_stages=self.stages, draft_costs=draft_costs,
                               prefill_share=self.prefill_share)
        return Separate()
