"""Where a training run stands, on disk: whoever kills it at any moment loses the steps since the last save only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fullpipe.errors import DamagedModel, UsageError

_STATE = "state.json"
_MODULE, _OPTIMIZER = "module.safetensors", "optimizer.safetensors"


def save_state(folder: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer,
               values: Mapping[str, Any]) -> None:
    """Write `folder`/step-N, whole or not at all, and remove older ones. values: plain JSON values.

    Raises `UsageError` when it cannot be written; what was there is as it was.
    """
    final, fresh = folder / f"step-{step}", folder / f".step-{step}.{os.getpid()}"
    try:
        for leftover in folder.glob(".step-*"):  # of runs that were killed while they saved
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_file({name: value.contiguous() for name, value in module.state_dict().items()}, fresh / _MODULE)
        save_file(_optimizer_tensors(optimizer), fresh / _OPTIMIZER)
        (fresh / _STATE).write_text(json.dumps({"step": step, **values}))
        for file in fresh.iterdir():
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)  # a leftover of a run that was begun anew
        os.rename(fresh, final)
        _sync(folder)
    except OSError as error:
        raise UsageError(f"cannot save the training state in {folder}: {error.strerror or error}",
                         hint="Make room there; the same command then goes on from the last save.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    for other in _steps(folder):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def load_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Put the newest state into module and optimizer, and return its values; None when there is none.

    Raises `DamagedModel` for a state that cannot be read.
    """
    steps = _steps(folder)
    if not steps:
        return None
    try:
        values: dict[str, Any] = json.loads((steps[-1] / _STATE).read_text())
        module.load_state_dict(load_file(steps[-1] / _MODULE))
        _fill_optimizer(optimizer, load_file(steps[-1] / _OPTIMIZER))
    except Exception as error:  # safetensors and torch raise kinds of their own
        raise DamagedModel(f"the training state {steps[-1]} cannot be read: {error}",
                           hint="Delete that folder to begin anew.") from error
    return values


def _steps(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if (path / _STATE).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments by index of the parameter; parameters that never had a gradient have none."""
    return {f"{index}.{name}": torch.as_tensor(value).contiguous()
            for index, state in optimizer.state_dict()["state"].items() for name, value in state.items()}


def _fill_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
