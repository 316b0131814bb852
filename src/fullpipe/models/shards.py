"""A model in a folder, as transformers' `save_pretrained` writes it: which files those are. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fullpipe.errors import DamagedModel
from fullpipe.models.recognise import damaged, fetch_again, no_model_in

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def shard_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Raises `DamagedModel` when one is missing, and what `no_model_in` says when all
    are."""
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise no_model_in(folder)
        return [single]
    names: dict[str, str] = read_json(index).get("weight_map", {})
    holder = {file: tensor for tensor, file in names.items()}
    for file, tensor in holder.items():
        if not (folder / file).is_file():
            raise DamagedModel(f"{folder / file} is missing, which {INDEX} names; it holds tensor "
                               f"{tensor}, among others", hint=fetch_again(folder / file))
    return [folder / file for file in sorted(holder)]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `DamagedModel`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise no_model_in(path.parent) from error
    except ValueError as error:
        raise damaged(path, f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise damaged(path, f"{path} holds no JSON object")
    return values
