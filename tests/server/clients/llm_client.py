"""Simon Willison's `llm`, with the server in its extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from trial import Trials

trials = Trials()
(trials.folder / "extra-openai-models.yaml").write_text(f"""
- model_id: served
  model_name: {trials.model}
  api_base: {trials.base}
  supports_schema: true
  supports_tools: true
- model_id: served-completion
  model_name: {trials.model}
  api_base: {trials.base}
  completion: true
""")


def llm(*arguments: str) -> str:
    """What the command prints."""
    done = subprocess.run([str(Path(sys.executable).with_name("llm")), *arguments], capture_output=True, text=True,
                          timeout=120, env=os.environ | {"LLM_USER_PATH": str(trials.folder)})
    assert done.returncode == 0, done.stderr[-400:]
    return done.stdout.strip()


SHORT = ("-o", "max_tokens", "24", "-o", "temperature", "0")
with trials("llm models"):
    assert "served" in llm("models")
with trials("a prompt, streamed"):
    streamed = llm("-m", "served", "Name three colours.", *SHORT)
    assert streamed
with trials("a prompt, whole"):
    assert llm("-m", "served", "Name three colours.", "--no-stream", *SHORT) == streamed
with trials("a system prompt, and a seed"):
    assert llm("-m", "served", "Hi", "-s", "Be brief.", "-o", "seed", "7", "-o", "max_tokens", "8")
with trials("a conversation goes on"):
    assert llm("-m", "served", "-c", "And three more.", *SHORT)
with trials("a completion model"):
    assert llm("-m", "served-completion", "One, two, three,", "-o", "max_tokens", "8", "-o", "temperature", "0")
with trials("a schema"):
    said = llm("-m", "served", "--schema", "name, age int", "Ada is 36 years old.", "-o", "max_tokens", "96")
    assert set(json.loads(said)) == {"name", "age"}
with trials("JSON"):
    assert llm("-m", "served", "Answer in JSON: who is Ada?", "-o", "json_object", "1", *SHORT).startswith("{")
with trials("tools are offered"):
    llm("-m", "served", "-T", "llm_version", "What is the version?", "-o", "max_tokens", "64")
trials.end()
