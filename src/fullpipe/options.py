"""Every option that a user may set, once, with its default. The command line, `LLM` and `fullpipe serve` read them here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How requests share the stations.

    max_num_seqs: requests that run at a time; the others wait in the engine. None: all.
    kv_cache_tokens: cache slots of all requests together, on each station. Then a request's cache begins small and
        grows; one that does not fit waits; and where there is nothing left to grow into, the youngest goes back to
        waiting, to be computed again from what it has emitted. None: no bound.
    enable_prefix_caching: keep the caches of finished requests while there is room, and let requests that begin alike
        take rows over. Needs kv_cache_tokens, and a draft that reads no hidden states: of rows that are not computed
        they never come.
    prefill_chunk: prompt tokens of a request in one flight at most.
    fanout: guesses that the draft is asked for per node.
    spare_slots: slots of a request beyond prompt and answer, for speculation. None: enough for the method.
    """

    max_num_seqs: int | None = None
    kv_cache_tokens: int | None = None
    enable_prefix_caching: bool = False
    prefill_chunk: int = 256
    fanout: int = 16
    spare_slots: int | None = None
