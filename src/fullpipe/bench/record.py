"""Filling a recording: the target answers every prompt once, several at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from fullpipe.bench.recording import Answer, Head, Recording, digest
from fullpipe.errors import UsageError
from fullpipe.llm import LLM
from fullpipe.prompts import FilePrompt
from fullpipe.request import SamplingParams

BATCH = 8  # prompts that share the pipeline: reading the weights is what takes time
Progress = Callable[[int, int, str], None]


def wanted_ids(prompts: Sequence[FilePrompt], turns: int | None) -> list[str]:
    """The ids of the answers to record. turns: of each prompt at most; None: all."""
    return [f"{prompt.id}#{turn}" for prompt in prompts for turn in range(len(prompt.turns[:turns]))]


def check_prompts(recording: Recording, prompts: Sequence[FilePrompt], turns: int | None) -> None:
    """Raises UsageError where an answer that is there was given to another prompt of the same id."""
    for prompt in prompts:
        for turn in range(len(prompt.turns[:turns])):
            found = recording.answers.get(f"{prompt.id}#{turn}")
            if found is not None and found.asked not in ("", digest(prompt.turns[: turn + 1])):
                raise UsageError(f"{recording.path} answers another prompt {found.id!r} than the one in the file",
                                 hint="Name another file or folder, or rename the file of prompts.")


def task_of(prompt: FilePrompt) -> str:
    """What a prompt is counted under: its category in our own set, else the set, as papers do."""
    stem = prompt.id.rpartition("/")[0]
    return prompt.category if stem == "prompts" else stem


def make_head(llm: LLM, model: str, dtype: str, params: SamplingParams) -> Head:
    return Head(model, dtype, params.max_tokens, params.temperature, params.seed,
                tuple(sorted(llm.tokenizer.eos_ids)), llm.vocab_size)


def record(llm: LLM, recording: Recording, prompts: Sequence[FilePrompt], turns: int | None,
           progress: Progress) -> None:
    """Answer what is not there yet; turn by turn, for a later turn continues the conversation with the answers
    before it. `llm` runs `pp` and reports margins."""
    head = recording.head
    params = SamplingParams(max_tokens=head.max_new_tokens, temperature=head.temperature, seed=head.seed)
    ids = wanted_ids(prompts, turns)
    total, done = len(ids), sum(id in recording.answers for id in ids)
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        todo = [prompt for prompt in prompts
                if f"{prompt.id}#{turn}" in ids and f"{prompt.id}#{turn}" not in recording.answers]
        for start in range(0, len(todo), BATCH):
            part = todo[start : start + BATCH]
            asked = [llm.encode(_conversation(llm, recording, prompt, turn)) for prompt in part]
            for prompt, tokens, said in zip(part, asked, llm.generate(asked, params)):
                recording.add(Answer(f"{prompt.id}#{turn}", task_of(prompt), tokens, said.token_ids,
                                     said.finish_reason,
                                     [round(margin, 5) if math.isfinite(margin) else None for margin in said.margins],
                                     digest(prompt.turns[: turn + 1])))
                done += 1
                progress(done, total, prompt.id)


def _conversation(llm: LLM, recording: Recording, prompt: FilePrompt, turn: int) -> list[dict[str, str]]:
    messages = []
    for index in range(turn + 1):
        messages.append({"role": "user", "content": prompt.turns[index]})
        if index < turn:
            tokens = recording.answers[f"{prompt.id}#{index}"].tokens
            text = llm.tokenizer.decode([token for token in tokens if token not in llm.tokenizer.eos_ids])
            messages.append({"role": "assistant", "content": text})
    return messages


def recording_path(folder: Path, temperature: float) -> Path:
    return folder / f"recording-t{temperature:g}.jsonl"
