"""Where a training run stands, on disk: whoever kills it at any moment loses the steps since the last save only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from torch import Tensor, nn

from fullpipe.errors import DamagedModel, UsageError

_STATE = "state.json"
_MODULE, _OPTIMIZER = "module.safetensors", "optimizer.safetensors"


def save_state(folder: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer,
               values: Mapping[str, Any]) -> None:
    """Write `folder`/step-N, whole or not at all, and remove older ones. values: plain JSON values. A step that is
    there stays: the same steps give the same state.

    Raises `UsageError` when it cannot be written; what was there is as it was.
    """
    final, fresh = folder / f"step-{step}", folder / f".step-{step}.{os.getpid()}"
    if (final / _STATE).exists():
        return
    try:
        for leftover in folder.glob(".step-*"):  # of runs that were killed while they saved
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        weights = {name: value.contiguous() for name, value in module.state_dict().items()}
        (fresh / _MODULE).write_bytes(as_bytes(weights))
        (fresh / _OPTIMIZER).write_bytes(as_bytes(_optimizer_tensors(optimizer)))
        (fresh / _STATE).write_text(json.dumps({"step": step, **values}))
        for file in fresh.iterdir():
            _sync(file)
        os.rename(fresh, final)
        _sync(folder)
    except (OSError, SafetensorError) as error:  # the latter also where the disk is full
        raise UsageError(f"cannot save the training state in {folder}: {getattr(error, 'strerror', None) or error}",
                         hint="Make room there; the same command then goes on from the last save.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    for other in folder.glob("step-*"):  # those too whose removal was cut off
        if _number(other) < step:
            shutil.rmtree(other, ignore_errors=True)


def load_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer,
               check: Callable[[dict[str, Any]], None] = lambda values: None) -> dict[str, Any] | None:
    """Put the newest state into module and optimizer, and return its values; None when there is none.

    check: raises when the values are not those of this run, before anything is read into it.

    Raises `DamagedModel` for a state that cannot be read, and what `check` raises.
    """
    steps = _steps(folder)
    if not steps:
        return None
    try:
        values: dict[str, Any] = json.loads((steps[-1] / _STATE).read_text())
        check(values)
        module.load_state_dict(load_file(steps[-1] / _MODULE))
        _fill_optimizer(optimizer, load_file(steps[-1] / _OPTIMIZER))
    except UsageError:
        raise
    except Exception as error:  # safetensors and torch raise kinds of their own
        raise DamagedModel(f"the training state {steps[-1]} cannot be read: {error}",
                           hint="Delete that folder to begin anew.") from error
    return values


def _steps(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if (path / _STATE).exists()]
    return sorted(found, key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


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
