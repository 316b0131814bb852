"""Is a replay what would have happened? The same requests with every stage real, on the same virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fullpipe.bench.receipt import Sample
from fullpipe.bench.recording import Answer, Head
from fullpipe.bench.settings import Setting
from fullpipe.llm import LLM
from fullpipe.planning.cluster import Cluster
from fullpipe.request import SamplingParams


def check_real(model: str, draft: str, cluster: Cluster, settings: Sequence[Setting], head: Head,
               answers: Sequence[Answer], samples: Sequence[Sample],
               progress: Callable[[int, int, str], None]) -> list[dict[str, Any]]:
    """Run each setting on each answer's prompt; a row for each, beside what the replay said."""
    params = SamplingParams(max_tokens=head.max_new_tokens, temperature=head.temperature, seed=head.seed)
    rows = []
    for done, setting in enumerate(settings):
        with LLM(model, draft=_source(setting, model, draft), method=setting.method, width=setting.width or 8,
                 depth=setting.depth, floor=setting.floor, dtype=head.dtype, cluster=cluster) as llm:
            for answer in answers:
                progress(done, len(settings), f"{setting.method}, {answer.id}")
                (said,) = llm.generate([answer.prompt], params)
                rows.append(_row(cluster, setting, answer, said, _replayed(samples, cluster, setting, answer)))
    return rows


def _source(setting: Setting, model: str, draft: str) -> str:
    """The setting's draft as `LLM` takes it; "model" stands for the model that the benchmark's draft names."""
    from fullpipe.assembly import draft_names

    if setting.draft in ("none", "ngram"):
        return setting.draft
    guesser = next(name for name in draft_names(model, draft) if name != "ngram")
    return setting.draft.replace("model", guesser)


def _replayed(samples: Sequence[Sample], cluster: Cluster, setting: Setting, answer: Answer) -> Sample:
    return next(one for one in samples if (one.cluster, one.prompt, one.method) == (cluster.name, answer.id,
                                                                                  setting.method))


def _row(cluster: Cluster, setting: Setting, answer: Answer, said: Any, replayed: Sample) -> dict[str, Any]:
    told = said.speculation
    same = (told["hits"], told["misses"], told["launched_rows"]) == (replayed.hits, replayed.misses,
                                                                     replayed.launched_rows)
    return {"cluster": cluster.name, "temperature": replayed.temperature, "method": str(setting), "prompt": answer.id,
            "tokens": len(said.token_ids), "text equal": said.token_ids == answer.tokens,
            "hits, misses and rows equal": same, "TBT ms, real stages": round(1e3 * said.timing["tbt_s"], 3),
            "TBT ms, replayed": round(1e3 * replayed.tbt_s, 3)}
