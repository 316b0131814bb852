"""Is a replay what would have happened? The same requests with every stage real, on the same virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fullpipe.assembly import draft_names
from fullpipe.options import Options
from fullpipe_lab.asking import Said, Simulated
from fullpipe_lab.clusters import Cluster
from fullpipe_lab.receipts import Sample
from fullpipe_lab.recording import Answer, Head
from fullpipe_lab.sweep import Setting


def check_real(model: str, draft: str, cluster: Cluster, settings: Sequence[Setting], head: Head,
               answers: Sequence[Answer], samples: Sequence[Sample],
               progress: Callable[[int, int, str], None]) -> list[dict[str, Any]]:
    """Run each setting on each answer's prompt; a row for each, beside what the replay said."""
    rows = []
    for done, setting in enumerate(settings):
        options = Options.of(model=model, draft=_draft(setting, model, draft), method=setting.method,
                             width=setting.width, depth=setting.depth, floor=setting.floor, dtype=head.dtype)
        with Simulated(options, cluster) as run:
            for answer in answers:
                progress(done, len(settings), f"{setting.method}, {answer.id}")
                (said,) = run.ask([answer.prompt], head.params)
                rows.append(_row(cluster, setting, answer, said, _replayed(samples, cluster, setting, answer)))
    return rows


def _draft(setting: Setting, model: str, draft: str) -> str:
    """The setting's draft as `Simulated` takes it; "model" stands for the model that the benchmark's draft names."""
    if setting.draft in ("none", "ngram"):
        return setting.draft
    guesser = next(name for name in draft_names(model, draft) if name != "ngram")
    return setting.draft.replace("model", guesser)


def _replayed(samples: Sequence[Sample], cluster: Cluster, setting: Setting, answer: Answer) -> Sample:
    wanted = cluster.name, answer.id, setting.method
    return next(one for one in samples if (one.cluster, one.prompt, one.method) == wanted)


def _row(cluster: Cluster, setting: Setting, answer: Answer, said: Said, replayed: Sample) -> dict[str, Any]:
    stats = said.stats
    same = (stats.hits, stats.misses, stats.launched_rows) == (replayed.hits, replayed.misses, replayed.launched_rows)
    return {"cluster": cluster.name, "temperature": replayed.temperature, "method": str(setting), "prompt": answer.id,
            "tokens": len(said.tokens), "text equal": said.tokens == answer.tokens,
            "hits, misses and rows equal": same, "TBT ms, real stages": round(1e3 * stats.tbt_s, 3),
            "TBT ms, replayed": round(1e3 * replayed.tbt_s, 3)}
