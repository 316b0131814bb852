"""`fullpipe train spd` and `train exit` as a user meets them: killed, out of room, on several devices, badly asked."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from command import Models, asking, run
from safetensors.torch import load_file
from typer.testing import Result

from fullpipe.models.spd_checkpoint import WEIGHTS, load_config

SETTINGS = ("--stages", "3", "--precision", "fp32", "--vocab-size", "96", "--max-length", "80", "--batch-tokens", "160",
            "--warmup", "5", "--threads", "1", "--validation", "0.1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations whose answers say the same few words."""
    source, path = random.Random(1), tmp_path_factory.mktemp("data") / "data.jsonl"
    answers = [" ".join(source.choices(("one", "two", "three", "a door"), k=source.randint(4, 9))) for _ in range(24)]
    path.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": f"say {number}"},
                                                       {"role": "assistant", "content": answer}]})
                              for number, answer in enumerate(answers)))
    return path


def arguments(models: Models, data: Path, out: Path, *more: str | Path, kind: str = "spd") -> list[str]:
    return [str(part) for part in ("train", kind, "--model", models.target, "--data", data, "--out", out, *SETTINGS,
                                   *more)]


def weights(out: Path) -> bytes:
    return (out / WEIGHTS).read_bytes()


def refused(result: Result, *said: str) -> None:
    assert result.exit_code == 2 and "Traceback" not in result.stderr, result.output
    for part in said:
        assert part in result.stderr


def test_a_module_is_trained_and_used(models: Models, data: Path, tmp_path: Path) -> None:
    result = run(*arguments(models, data, tmp_path / "module", "--steps", "60"))
    assert result.exit_code == 0, result.stderr
    assert "22 texts to learn from, 2 held out; draft vocabulary of 96 tokens" in result.stderr
    head, *rows, last = result.stdout.splitlines()
    assert head.split("  ")[0] == "stages" and len(rows) == 3
    assert last.startswith(f"{tmp_path / 'module'}: 60 steps in ")
    assert last.endswith(f"use it with --draft spd:{tmp_path / 'module'}")
    asked = ("--max-tokens", "9", "--json")
    answer = run(*asking(models.target, *asked, draft=f"spd:{tmp_path / 'module'}", stages=3))
    plain = run(*asking(models.target, *asked, "--method", "pp", draft="none", stages=3))
    assert answer.exit_code == 0 and "warning" not in answer.stderr, answer.stderr
    assert json.loads(answer.stdout)["token_ids"] == json.loads(plain.stdout)["token_ids"]


def test_so_is_an_exit_head(models: Models, data: Path, tmp_path: Path) -> None:
    result = run(*arguments(models, data, tmp_path / "exit", "--steps", "5", "--layers", "2", kind="exit"))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith(f"use it with --draft exit:{tmp_path / 'exit'}\n")
    config = load_config(tmp_path / "exit")
    assert (config.kind, config.num_layers, config.bounds) == ("exit", 2, (2,))
    answer = run(*asking(models.target, "--max-tokens", "5", "--method", "ppsd", draft=f"exit:{tmp_path / 'exit'}",
                         stages=3))
    assert answer.exit_code == 0, answer.stderr


# ---- what stops it -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(models: Models, data: Path, tmp_path: Path) -> None:
    result = run(*arguments(models, data, tmp_path / "module", "--steps", "20", "--lr", "1e38"))
    refused(result, " of step ", "Lower the learning rate (--lr)")
    assert not (tmp_path / "module" / WEIGHTS).exists()


def test_text_without_labels(models: Models, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "nobody answers me"}]}))
    refused(run(*arguments(models, tmp_path / "data.jsonl", tmp_path / "module", "--steps", "2")),
            "error: there is nothing to learn in", "Conversations need an answer of the assistant")


def test_a_vocabulary_without_an_end(models: Models, data: Path, tmp_path: Path) -> None:
    shutil.copytree(models.target, tmp_path / "target")
    (tmp_path / "target" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    (tmp_path / "vocab.json").write_text(json.dumps({"token_ids": list(range(40, 60))}))
    refused(run(*arguments(models, data, tmp_path / "module", "--steps", "2", "--vocab", tmp_path / "vocab.json",
                           "--model", tmp_path / "target")), "vocab.json", "end", "fullpipe train vocab")


def test_nothing_is_learnt(models: Models, data: Path, tmp_path: Path) -> None:
    result = run(*arguments(models, data, tmp_path / "module", "--steps", "400", "--lr", "1e-12", "--warmup", "0",
                            "--stages", "1", "--taps", "0,5", "--batch-tokens", "1600", "--refreshed", "0", "--ahead",
                            "0"))
    refused(result, "error: nothing is learnt: after 200 steps the loss is", "Try another learning rate")


def test_other_options_are_another_run(models: Models, data: Path, tmp_path: Path) -> None:
    assert run(*arguments(models, data, tmp_path / "module", "--steps", "3")).exit_code == 0
    refused(run(*arguments(models, data, tmp_path / "module", "--steps", "3", "--lr", "1e-4")),
            "holds a run with another setting: rate", "Give the same options to go on with it")


@pytest.mark.parametrize(("limit", "said"), [
    (20_000, "cannot keep hidden states in"), (200_000, "cannot save the training state in"),
], ids=["features", "state"])
def test_a_full_disk(models: Models, data: Path, tmp_path: Path, limit: int, said: str) -> None:
    """The limit on a file's size stands in for it. What was there is as it was, and the same command goes on."""
    out, shared = tmp_path / "module", ("--steps", "9", "--features", tmp_path / "features")
    if limit > 20_000:
        run(*arguments(models, data, tmp_path / "other", *shared))
    with files_limited(limit):
        refused(run(*arguments(models, data, out, *shared)), said, "Make room")
    assert not (out / WEIGHTS).exists() and not list(out.glob("state/step-*"))
    assert run(*arguments(models, data, out, *shared)).exit_code == 0


@contextmanager
def files_limited(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_cannot_be_written(models: Models, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(run(*arguments(models, data, tmp_path / "file" / "module", "--steps", "2")), "error: cannot write in ",
            "Name a folder that is writable")


# ---- killed ------------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_weights(models: Models, data: Path,
                                                                     tmp_path: Path) -> None:
    """Killed while it starts, while it saves for the first time, and in the middle: the weights are the same bits."""
    options = ("--steps", "150")
    assert run(*arguments(models, data, tmp_path / "whole", *options)).exit_code == 0
    killed = arguments(models, data, tmp_path / "killed", *options, "--save-minutes", "1e-6")
    for step in (0, 1, 60):
        kill_at(killed, tmp_path / "killed", step)
        assert not (tmp_path / "killed" / WEIGHTS).exists()
    last = saved_step(tmp_path / "killed")
    assert 60 <= last < 150
    assert run(*killed).exit_code == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    for name in ("module.safetensors", "optimizer.safetensors"):
        first, second = (tmp_path / run / "state" / "step-150" / name for run in ("killed", "whole"))
        assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in (tmp_path / "killed" / "state").glob("*step*")] == ["step-150"]


def saved_step(out: Path) -> int:
    found = [path.parent.name.removeprefix("step-") for path in out.glob("state/step-*/state.json")]
    return max(map(int, found), default=-1)


def kill_at(arguments: Sequence[str], out: Path, step: int) -> None:
    """Start it, and end it without a warning once `step` has been saved (0: once it has begun to read the text)."""
    process = subprocess.Popen([sys.executable, "-m", "fullpipe", *arguments], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        while not (out / "features").exists() if step == 0 else saved_step(out) < step:
            assert process.poll() is None, "it has ended"
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


# ---- several devices ---------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_two_devices_are_two_batches_to_a_step(models: Models, data: Path, tmp_path: Path) -> None:
    """torchrun with two processes: the samples, the fillings and the loss are those of --accumulate 2 on one."""
    assert run(*arguments(models, data, tmp_path / "one", "--steps", "12", "--accumulate", "2")).exit_code == 0
    command = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    said = launched(*command, "-m", "fullpipe", *arguments(models, data, tmp_path / "two", "--steps", "12"))
    assert said.count("12 steps in") == 1, "one of them speaks"
    one, two = load_file(tmp_path / "one" / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-2)  # they are stored in bfloat16
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["processes"] == 2
    assert summary["acceptance"] == json.loads((tmp_path / "one" / "summary.json").read_text())["acceptance"]
    assert {path.name for path in (tmp_path / "two").iterdir()} >= {"features", "features-1"}
    refused(run(*arguments(models, data, tmp_path / "two", "--steps", "12")), "another setting: processes")


@pytest.mark.processes
def test_accelerate_starts_it(models: Models, data: Path, tmp_path: Path) -> None:
    """It starts several processes on GPUs (on processors it would need MPI)."""
    assert run(*arguments(models, data, tmp_path / "one", "--steps", "5")).exit_code == 0
    said = launched("accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
                    "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "fullpipe",
                    *arguments(models, data, tmp_path / "two", "--steps", "5"))
    assert "5 steps in" in said
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def end(process: subprocess.Popen[str]) -> None:
    """A launcher's workers have sessions of their own, and outlive it."""
    with suppress(psutil.NoSuchProcess):
        for worker in (*psutil.Process(process.pid).children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                worker.kill()
    process.wait()


def launched(*command: str) -> str:
    """What it says. However it ends, its own processes end with it."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        out, err = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 0, err
    return out
