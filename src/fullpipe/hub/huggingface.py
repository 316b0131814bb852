"""Models of the Hugging Face hub: the safetensors, configuration and tokenizer files of one revision,
or one of its GGUF files.

They live in Hugging Face's own cache (`HF_HOME`), shared with every other program that uses it; endpoint and
token are Hugging Face's own settings too.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fullpipe.errors import CacheError, FetchError, FullpipeError, ModelNotFound, UnsupportedModel
from fullpipe.hub.names import Repository

_WANTED = [
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json",
]
# Sub-folders hold other formats; Mistral's repositories hold all weights a second time as "consolidated".
_UNWANTED = ["*/*", "consolidated*"]
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")
_USUAL_GGUF = "Q4_K_M"
# Errors of the network are OSErrors too, of other classes than these.
_DISK_ERRORS = {OSError, PermissionError, NotADirectoryError, FileExistsError, FileNotFoundError}


def fetch(repository: Repository, *, offline: bool) -> Path:
    """The local folder of a model, or one of its GGUF files, downloaded where it must be.

    offline: use only what Hugging Face's cache holds. Raises `ModelNotFound` (no such model, revision or file, or
    not in the cache), `UnsupportedModel` (nothing in it that can be read), `FetchError` (network, licence not
    accepted) and `CacheError` (disk full, not writable).
    """
    if repository.gguf is not None:
        return _gguf(repository, _files(repository, offline), offline)
    folder = _download(repository, _WANTED, _UNWANTED, offline)
    missing = next((one for one in ("config.json", "*.safetensors") if not any(folder.glob(one))), None)
    if missing is None:
        return folder
    files = _files(repository, offline)
    if any(name.endswith(".gguf") for name in files):
        return _gguf(repository, files, offline)
    pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in files)
    raise UnsupportedModel(
        f"{repository} has no {missing}: " + ("its weights are PyTorch checkpoints, which can run code when they are "
                                              "read, and are never loaded" if pickled and missing != "config.json" else
                                              "it is not a model as transformers writes it"),
        hint="Choose one with safetensors weights or GGUF files.")


def _gguf(repository: Repository, files: Sequence[str], offline: bool) -> Path:
    """The GGUF file that is meant; of one that is split, the first part."""
    parts = chosen_gguf(repository, files)
    folder = _download(repository, [_literally(part) for part in parts], [], offline)
    return folder / parts[0]


def chosen_gguf(repository: Repository, files: Sequence[str]) -> list[str]:
    """The file that is meant, or all parts of it: the one named so, or with that in its name. Where nothing is named,
    the only one, or Q4_K_M, as llama.cpp has it.

    Raises `ModelNotFound` when there is none, or several.
    """
    wanted = repository.gguf
    models: dict[str, list[str]] = {}  # the parts of a split file are one model
    for name in sorted(files):
        if name.endswith(".gguf") and "mmproj" not in name.lower():
            models.setdefault(_PART.sub("", name), []).append(name)
    named = [parts for parts in models.values() if wanted in parts]
    if not named and (wanted is not None or len(models) > 1):
        word = re.compile(rf"(^|[-._/]){re.escape(wanted or _USUAL_GGUF)}([-._/]|$)", re.IGNORECASE)
        named = [parts for name, parts in models.items() if word.search(name)]
    found = named if named or wanted else list(models.values())
    if len(found) == 1:
        return found[0]
    listed = ", ".join(parts[0] for parts in (found or models.values())) or "none"
    raise ModelNotFound(
        f"{repository.id} has {'several GGUF files' if found else 'no GGUF file'}"
        f"{f' with {wanted} in the name' if wanted else ''}; " + ("they are: " if found else "its GGUF files are: ")
        + listed, hint=f"Say which, by what tells it from the others: {repository.id}:Q8_0, or {repository.id}:FILE.")


def _literally(name: str) -> str:
    """A pattern of `fnmatch` that is this name."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _files(repository: Repository, offline: bool) -> list[str]:
    """What the repository has; offline, what of it is here."""
    if offline:
        folder = _download(repository, [], [], offline)
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    from huggingface_hub import HfApi

    with _told(repository, offline):
        found = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(repository.id, revision=repository.revision)
        return [file.rfilename for file in found.siblings or ()]


def _download(repository: Repository, wanted: Sequence[str], unwanted: Sequence[str], offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    with _told(repository, offline):
        return Path(snapshot_download(
            repository.id, revision=repository.revision, allow_patterns=list(wanted), ignore_patterns=list(unwanted),
            local_files_only=offline, endpoint=os.environ.get("HF_ENDPOINT"), tqdm_class=_bar_class()))


@contextmanager
def _told(repository: Repository, offline: bool) -> Iterator[None]:
    """Turns what Hugging Face's library raises into our errors."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import HfHubHTTPError

    try:
        yield
    except Exception as error:
        of_the_network = type(error).__module__.startswith(("httpx", "requests"))  # the library had several in turn
        if not (of_the_network or isinstance(error, (HfHubHTTPError, HFValidationError, OSError, RuntimeError))):
            raise
        raise _translated(repository, error, offline) from error


def _bar_class() -> type:
    """Hugging Face's own progress bars, on a terminal only."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **{**options, "disable": not sys.stderr.isatty()})

    return Bar


def _translated(repository: Repository, error: Exception, offline: bool) -> FullpipeError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, revision, name = repository.id, repository.revision, str(repository)
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError too, so it is asked first
        return FetchError(
            f"{repo} is given only to those who accepted its licence",
            hint=f"Accept it on https://huggingface.co/{repo}, then run `hf auth login` or set HF_TOKEN.",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(f"{repo} has no revision {revision!r}", hint="Name one of its branches or tags.")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return ModelNotFound(
            f"Hugging Face has no model {repo!r}, or it is private",
            hint="Check the spelling; for a private one, run `hf auth login` or set HF_TOKEN.",
        )
    if (status := _status(error)) in (401, 403):
        return FetchError(f"Hugging Face refuses {repo} to you (status {status})",
                          hint="Sign in with `hf auth login` or set HF_TOKEN, a token that may read it.")
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


def _status(error: Exception) -> int | None:
    """Of the answer that the error is about, if it is about one."""
    answers = (getattr(one, "response", None) for one in (error, error.__cause__))
    return next((one.status_code for one in answers if one is not None), None)


def _first_line(error: Exception) -> str:
    """What went wrong underneath: the hub's own message for it is general and long."""
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
