"""Virtual-time speedup over `pp` on imagined clusters, with the module that is shipped. Tokens and hits are real."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from spd_study.journal import Journal
from spd_study.measure import DTYPE, Modules, asked

from fullpipe import LLM, SamplingParams
from fullpipe.prompts import FilePrompt

# draft, method, width, refresh
SETUPS = (("none", "pp", 1, False), ("main", "spd", 1, True), ("main", "fullpipe", 8, True),
          ("ngram", "fullpipe", 8, False), ("main,ngram", "fullpipe", 8, True), ("main", "spd", 1, False),
          ("main", "fullpipe", 8, False), ("main", "spd", 4, False))


def run_clusters(model: str, modules: Modules, prompts: Sequence[FilePrompt], tokens: int, clusters: Sequence[str],
                 journal: Journal) -> None:
    params = SamplingParams(max_tokens=tokens)
    for draft, method, width, refresh in SETUPS:
        for cluster in clusters:
            setup = {"cluster": cluster, "draft": draft, "method": method, "width": width, "refresh": refresh}
            name = f"{cluster}/{draft}/{method}/w{width}" + "/refresh" * refresh
            left = [prompt for prompt in prompts if f"{name}/{prompt.id}" not in journal]
            if not left:
                continue
            with LLM(model, draft=modules.draft(draft, 0), cluster=cluster, method=method, width=width,
                     refresh=refresh, dtype=DTYPE, threads=1) as llm:
                for prompt in left:
                    said = llm.chat(asked(prompt), params)
                    journal.add(f"{name}/{prompt.id}", sample(setup | {"stages": llm.num_stages}, prompt, said))
            print(name, file=sys.stderr, flush=True)


def sample(setup: dict[str, Any], prompt: FilePrompt, said: Any) -> dict[str, Any]:
    figures = {name: said.speculation[name] for name in ("steps", "hits", "misses", "draft_calls", "draft_rows")}
    return {**setup, "prompt": prompt.id, "tokens": said.token_ids, "tbt_s": said.timing["tbt_s"], **figures}
