"""lm-eval: log-likelihoods over completions, texts over chats, on tasks of a few lines that lie in the folder."""

from __future__ import annotations

import json
import math
import os
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
import lm_eval
from lm_eval.tasks import TaskManager
from trial import Trials

trials = Trials()
QUESTIONS = [("The sky is", ["blue", "a spoon"], 0), ("Two and two is", ["seventeen", "four"], 1),
             ("Fire is", ["hot", "cold"], 0), ("A cat is an", ["equation", "animal"], 1),
             ("Water is", ["dry", "wet"], 1), ("Snow is", ["white", "square"], 0)]
TASKS = trials.folder / "tasks"
TASKS.mkdir(exist_ok=True)
(TASKS / "questions.jsonl").write_text("".join(
    json.dumps({"question": question, "choices": choices, "answer": answer}) + "\n"
    for question, choices, answer in QUESTIONS))
_DATA = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {TASKS / "questions.jsonl"}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
(TASKS / "choice.yaml").write_text(f"""task: fullpipe_choice
{_DATA}output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""")
(TASKS / "text.yaml").write_text(f"""task: fullpipe_text
{_DATA}output_type: generate_until
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
metric_list:
  - metric: bypass
    aggregation: bypass
    higher_is_better: true
""")


def run(kind: str, task: str, **more: Any) -> list[Any]:
    """Everything that was answered, document by document."""
    path = "chat/completions" if "chat" in kind else "completions"
    arguments = {"model": trials.model, "base_url": f"{trials.base}/{path}", "max_retries": 1, "max_length": 512,
                 "num_concurrent": 2, **more}
    chat = "chat" in kind
    results = lm_eval.simple_evaluate(model=kind, model_args=arguments, tasks=[task], apply_chat_template=chat,
                                      task_manager=TaskManager(include_path=str(TASKS)), bootstrap_iters=0,
                                      batch_size=arguments.pop("batch_size", 1))
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(QUESTIONS)
    return [sample["resps"] for sample in samples]


def likelihoods(**more: Any) -> list[float]:
    found = run("local-completions", "fullpipe_choice", tokenizer=str(trials.folder / "tokenizer"),
                tokenizer_backend="huggingface", **more)
    numbers = [float(one[0][0]) for resps in found for one in resps]
    assert len(numbers) == 2 * len(QUESTIONS) and all(math.isfinite(one) and one < 0 for one in numbers), numbers
    return numbers


with trials("local-completions, loglikelihood of tokens"):
    of_tokens = likelihoods(tokenized_requests=True)
    right = sum((first > second) == (answer == 0) for first, second, (_, _, answer) in zip(
        of_tokens[::2], of_tokens[1::2], QUESTIONS))
    assert right >= len(QUESTIONS) // 2, of_tokens
with trials("local-completions, loglikelihood of texts says the same"):
    of_texts = likelihoods(tokenized_requests=False)
    assert max(abs(one - other) for one, other in zip(of_tokens, of_texts)) < 1e-3, (of_tokens, of_texts)
with trials("local-completions, loglikelihood four at a time says the same"):
    at_once = likelihoods(tokenized_requests=True, batch_size=4)
    assert max(abs(one - other) for one, other in zip(of_tokens, at_once)) < 1e-3, (of_tokens, at_once)
with trials("local-completions, generate_until"):
    assert all(resps[0] for resps in run("local-completions", "fullpipe_text", tokenizer_backend="none"))
with trials("local-chat-completions, generate_until"):
    assert all(resps[0] for resps in run("local-chat-completions", "fullpipe_text"))
trials.end()
