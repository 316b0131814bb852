"""Models of the Hugging Face hub: the safetensors, configuration and tokenizer files of one revision.

They live in Hugging Face's own cache (`HF_HOME`), shared with every other program that uses it; endpoint and
token are Hugging Face's own settings too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fullpipe.errors import CacheError, FetchError, FullpipeError, ModelNotFound, UnsupportedModel

_WANTED = [
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json",
]
# Sub-folders hold other formats; Mistral's repositories hold all weights a second time as "consolidated".
_UNWANTED = ["*/*", "consolidated*"]
# Errors of the network are OSErrors too, of other classes than these.
_DISK_ERRORS = {OSError, PermissionError, NotADirectoryError, FileExistsError, FileNotFoundError}


def snapshot(name: str, *, offline: bool) -> Path:
    """The local folder of `name` ("org/model", or "org/model@revision"), downloaded where it must be.

    offline: use only what Hugging Face's cache holds. Raises `ModelNotFound` (no such model or revision, or
    not in the cache), `UnsupportedModel` (no safetensors in it), `FetchError` (network, licence not
    accepted) and `CacheError` (disk full, not writable).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import HfHubHTTPError

    repo, _, revision = name.partition("@")
    try:
        folder = Path(snapshot_download(
            repo, revision=revision or None, allow_patterns=_WANTED, ignore_patterns=_UNWANTED,
            local_files_only=offline, endpoint=os.environ.get("HF_ENDPOINT"), tqdm_class=_bar_class(),
        ))
    except (HfHubHTTPError, HFValidationError, OSError, RuntimeError) as error:
        raise _translated(name, error, offline) from error
    _require_files(name, folder)
    return folder


def _bar_class() -> type:
    """Hugging Face's own progress bars, on a terminal only."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **{**options, "disable": not sys.stderr.isatty()})

    return Bar


def _require_files(name: str, folder: Path) -> None:
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise UnsupportedModel(
                f"{name} has no {pattern}: it is not a model as transformers writes it",
                hint="Choose one with safetensors weights, or download a GGUF file and name its path.",
            )


def _translated(name: str, error: Exception, offline: bool) -> FullpipeError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = name.partition("@")
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too, so it is asked first
        return FetchError(
            f"{repo} is given only to those who accepted its licence",
            hint=f"Accept it on the model's page, then `hf auth login` or set HF_TOKEN. ({repo})",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(f"{repo} has no revision {revision!r}", hint="Name one of its branches or tags.")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return ModelNotFound(
            f"Hugging Face has no model {repo!r}, or it is private",
            hint="Check the spelling; for a private one, `hf auth login` or set HF_TOKEN.",
        )
    if offline:
        return ModelNotFound(
            f"{name} is not in Hugging Face's cache on this machine",
            hint=f"Run `fullpipe pull {name}` with a network and without FULLPIPE_OFFLINE, HF_HUB_OFFLINE.",
        )
    if type(error) in _DISK_ERRORS:
        return CacheError(
            f"Hugging Face's cache folder cannot take {name}: {error}",
            hint="Free some space or make it writable, or set HF_HOME to another folder.",
        )
    return FetchError(
        f"could not fetch {name} from Hugging Face: {_first_line(error)}",
        hint="Check the network (and HF_ENDPOINT, where you use a mirror), then run the same command again: "
        "what has arrived is kept. The models that `fullpipe models` lists come from elsewhere.",
    )


def _first_line(error: Exception) -> str:
    """What went wrong underneath: the hub's own message for it is general and long."""
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
