"""GuideLLM: a few synthetic requests over each kind of endpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trial import Trials

trials = Trials()
NUMBER, PROMPT, ANSWER = 4, 32, 8


def benchmark(path: str) -> Any:
    """The report of a run, one request after another."""
    out = trials.folder / f"{path.strip('/').replace('/', '-')}.json"
    done = subprocess.run(
        [str(Path(sys.executable).with_name("guidellm")), "run",
         "--backend", f"kind=openai_http,target={trials.url},model={trials.model},request_format={path}",
         "--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={ANSWER}",
         "--profile", "kind=synchronous", "--constraint", f"kind=max_requests,count={NUMBER}",
         "--output", f"kind=json,path={out}",
         "--tokenizer", f"kind=huggingface_auto,model={trials.folder / 'tokenizer'}"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, (done.stdout[-200:], done.stderr[-400:])
    return json.loads(out.read_text())


def check(report: Any) -> None:
    """All requests were answered, each with as many tokens as were asked for."""
    (one,) = report["benchmarks"]
    requests = one["requests"]
    assert len(requests["successful"]) == NUMBER and not requests["errored"], {
        kind: len(found) for kind, found in requests.items()}
    assert {found["output_metrics"]["text_tokens"] for found in requests["successful"]} == {ANSWER}


for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
    with trials(f"{path}, one after another"):
        check(benchmark(path))
trials.end()
