"""Filling a recording: the target answers every prompt once, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fullpipe.errors import UsageError
from fullpipe.models.dtypes import pick_dtype
from fullpipe.options import Options
from fullpipe.prompts import FilePrompt
from fullpipe.request import SamplingParams
from fullpipe_lab.asking import Simulated
from fullpipe_lab.files import make_folder
from fullpipe_lab.recording import Answer, Head, Recording, digest

AT_ONCE = 8  # prompts that share the stages: reading the weights is what takes time
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


def recording_path(folder: Path, temperature: float) -> Path:
    """Where a benchmark in this folder looks for the answers at this temperature."""
    return folder / f"recording-t{temperature:g}.jsonl"


def fill(paths: dict[float, Path], model: str, prompts: Sequence[FilePrompt], turns: int | None,
         params: SamplingParams, dtype: str, threads: int | None, *, progress: Progress,
         say: Callable[[str], None]) -> dict[float, Recording]:
    """Recordings at each temperature that hold every prompt. Loads the model only if something is missing.

    Raises UsageError for a recording of another model, of other parameters, or of other prompts of the same name.
    """
    dtype, ready = pick_dtype(dtype), {heat: Recording.load(path) for heat, path in paths.items() if path.exists()}
    for heat, recording in ready.items():
        head = recording.head
        recording.check(Head(model, dtype, params.max_tokens, heat, params.seed, head.eos, head.vocab))
        check_prompts(recording, prompts, turns)
    wanted = wanted_ids(prompts, turns)
    missing = [heat for heat in paths if heat not in ready or any(id not in ready[heat].answers for id in wanted)]
    if not missing:
        return ready
    for path in paths.values():
        make_folder(path.parent)  # what cannot be written had better be known before the model runs
    options = Options.of(model=model, draft="none", method="pp", dtype=dtype, threads=threads, margins=True)
    with Simulated(options, 1, costs="unit", at_once=AT_ONCE, progress=say) as target:
        for heat in missing:
            prepared = target.prepared
            head = Head(model, dtype, params.max_tokens, heat, params.seed, tuple(sorted(prepared.tokenizer.eos_ids)),
                        prepared.vocab_size)
            ready[heat] = Recording.open(paths[heat], head)
            record(target, ready[heat], prompts, turns, progress)
    return ready


def record(target: Simulated, recording: Recording, prompts: Sequence[FilePrompt], turns: int | None,
           progress: Progress) -> None:
    """Answer what is not there yet; turn by turn, for a later turn continues the conversation with the answers before
    it. The target runs `pp` and tells margins."""
    ids = wanted_ids(prompts, turns)
    done = sum(id in recording.answers for id in ids)
    for turn in range(max(len(prompt.turns[:turns]) for prompt in prompts)):
        todo = [prompt for prompt in prompts if len(prompt.turns[:turns]) > turn
                and f"{prompt.id}#{turn}" not in recording.answers]
        for start in range(0, len(todo), AT_ONCE):
            part = todo[start : start + AT_ONCE]
            asked = [target.encode(_conversation(target, recording, prompt, turn)) for prompt in part]
            for prompt, tokens, said in zip(part, asked, target.ask(asked, recording.head.params)):
                assert said.finish is not None
                margins = [None if margin is None else round(margin, 5) for margin in said.margins]
                recording.add(Answer(f"{prompt.id}#{turn}", task_of(prompt), tokens, said.tokens, said.finish, margins,
                                     digest(prompt.turns[: turn + 1])))
                done += 1
                progress(done, len(ids), prompt.id)


def _conversation(target: Simulated, recording: Recording, prompt: FilePrompt, turn: int) -> list[dict[str, str]]:
    """What the model is asked in this turn: the turns so far with its own answers between them."""
    messages = []
    for index in range(turn + 1):
        messages.append({"role": "user", "content": prompt.turns[index]})
        if index < turn:
            tokens = recording.answers[f"{prompt.id}#{index}"].tokens
            tokenizer = target.prepared.tokenizer
            text = tokenizer.decode([token for token in tokens if token not in tokenizer.eos_ids])
            messages.append({"role": "assistant", "content": text})
    return messages
