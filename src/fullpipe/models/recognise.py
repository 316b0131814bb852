"""What lies where a model should be, by the name that its owner knows it by, and the way out. No torch.

People name the folder of an adapter, the pointer that git left in place of a file, a page that said "log in". Reading
that as a model can only end in "damaged", which is not so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullpipe.errors import DamagedModel, ModelError, ModelNotFound, UnsupportedModel

_HEAD = 512  # bytes that tell what a file is
_SHOWN = 4  # names that a message lists
_WEIGHTS = "Look for a repository of the same model with safetensors or GGUF files."
_SAVE_AGAIN = ("Save it anew with transformers, which writes safetensors: "
               "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), and the tokenizer too.")
_HUB_CACHE = re.compile(r"models--(.+)")  # Hugging Face's cache: models--org--name/snapshots/COMMIT/FILE


@dataclass(frozen=True, slots=True)
class Strange:
    """Something else than what was looked for: what it is, as in "it is ...", and what to do."""

    what: str
    hint: str


def damaged(path: Path, message: str) -> DamagedModel:
    """The error for a file that cannot be read as what it should be. It names what the file is, where that is known;
    else it says `message`."""
    if strange := strange_file(path):
        return DamagedModel(f"{path} is {strange.what}", hint=strange.hint)
    return DamagedModel(message, hint=fetch_again(path))


def fetch_again(path: Path) -> str:
    """How to get a good copy, which depends on where this one came from."""
    if path.with_name(f"{path.name}.json").is_file() and path.suffix == ".gguf":  # a stamp of `hub.cache`
        return f"Run `fullpipe pull --verify {path.stem}`: it removes a file that is not what it should be."
    if path.with_name(f"{path.name}.filled").is_file():  # a note of `models.copies`
        return f"Delete {path}: it is a copy of the head's, and comes from there again."
    for folder in path.absolute().parents:
        if found := _HUB_CACHE.fullmatch(folder.name):
            name = found[1].replace("--", "/")
            return f"Delete {path.resolve()} and run `fullpipe pull {name}`, which fetches it again."
    return "Copy or download it again from where it came from: it may have been cut off on the way."


# ---- files -----------------------------------------------------------------------------------------------------------

_DOWNLOAD_AGAIN = ("Download the file itself; `hf download ORG/NAME` does, signed in with `hf auth login` where that "
                   "is asked for.")
_EMPTY = Strange("empty", "A copy or a download of it was cut off, or the disk was full: fetch it once more.")
_POINTER = Strange("a Git LFS pointer, a few lines of text in place of the file",
                   "Run `git lfs pull` in its folder, after `git lfs install` if git does not know lfs.")
_PAGE = Strange("a web page, not a file of a model: a login or an error page was saved in its place", _DOWNLOAD_AGAIN)
_REFUSAL = Strange("an error message of a server that was saved in place of the file", _DOWNLOAD_AGAIN)
_UNFINISHED = Strange("a download that has not ended", "Let it end, or run what fetched it again.")
_PICKLE = Strange("a PyTorch checkpoint; these can run code when they are read, and are never loaded", _SAVE_AGAIN)
_ARCHIVE = Strange("a compressed archive", "Unpack it, and name what was in it.")
_OLD_GGML = Strange("in a format of llama.cpp from before GGUF", f"Convert it anew from the original. {_WEIGHTS}")
_SAFETENSORS = Strange("a safetensors file; its configuration and tokenizer lie beside it",
                       "Name the folder that it lies in.")
_JSON = Strange("a JSON file, such as lie beside a model's weights", "Name the folder that it lies in.")
_ONNX = Strange("an ONNX file", _WEIGHTS)

_BEGINNINGS: tuple[tuple[bytes, Strange], ...] = (
    (b"version https://git-lfs.github.com/spec/", _POINTER),
    (b"<!doctype html", _PAGE), (b"<html", _PAGE), (b"<?xml", _REFUSAL),
    (b'{"error"', _REFUSAL), (b"entry not found", _REFUSAL), (b"repository not found", _REFUSAL),
    (b"invalid username or password", _REFUSAL), (b"invalid credentials", _REFUSAL), (b"access to model", _REFUSAL),
    (b"\x1f\x8b", _ARCHIVE), (b"\x28\xb5\x2f\xfd", _ARCHIVE), (b"7z\xbc\xaf", _ARCHIVE), (b"\xfd7zxz", _ARCHIVE),
    (b"\x80\x02", _PICKLE), (b"tjgg", _OLD_GGML), (b"lmgg", _OLD_GGML), (b"fmgg", _OLD_GGML), (b"algg", _OLD_GGML),
)
_UNFINISHED_NAMES = (".part", ".incomplete", ".crdownload", ".download", ".aria2", ".tmp")


def strange_file(path: Path) -> Strange | None:
    """What a file is, if its first bytes or its name tell that it is no file of a model."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    if path.name.lower().endswith(_UNFINISHED_NAMES):
        return _UNFINISHED
    if not head:
        return _EMPTY
    begins = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if found := next((strange for start, strange in _BEGINNINGS if begins.startswith(start)), None):
        return found
    if head.startswith(b"PK\x03\x04"):
        return _PICKLE if path.suffix in (".bin", ".pt", ".pth", ".ckpt") or b"data.pkl" in head else _ARCHIVE
    if path.suffix == ".onnx":
        return _ONNX
    return None


def not_gguf(path: Path) -> ModelError:
    """The error for a file that was named as a model and does not begin as GGUF does."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    strange = strange_file(path) or (
        _SAFETENSORS if head[8:9] == b"{" else _JSON if head.lstrip().startswith(b"{") else None)
    if strange:
        return DamagedModel(f"{path} is not a GGUF file: it is {strange.what}", hint=strange.hint)
    return DamagedModel(f"{path} is not a GGUF file: it begins with {head[:4]!r}, not b'GGUF'", hint=fetch_again(path))


# ---- folders ---------------------------------------------------------------------------------------------------------


def no_model_in(folder: Path) -> ModelError:
    """The error for a folder that is named as a model and has no config.json, or no weights beside it."""
    for kind in _KINDS:
        if strange := kind(folder):
            return UnsupportedModel(f"{folder} is {strange.what}", hint=strange.hint)
    if (inside := _subfolders(folder)):
        return ModelNotFound(f"{folder} has no model in it; {_listed(inside)} below it may",
                             hint=f"Name it: {inside[0]}.")
    if not (folder / "config.json").is_file():
        there = sorted(path.name for path in folder.iterdir())
        return ModelNotFound(f"the folder {folder} holds no model: it has no config.json; "
                             f"{'it has ' + _listed(there) if there else 'it is empty'}",
                             hint="Name a folder as transformers' `save_pretrained` writes it, or a GGUF file.")
    return ModelNotFound(f"{folder} holds no safetensors weights",
                         hint="Expected model.safetensors, or model.safetensors.index.json and its shards.")


def strange_folder(folder: Path) -> UnsupportedModel | None:
    """The error for a folder that looks like a model and is of a kind of its own."""
    if strange := next((found for kind in (_adapter, _mlx) if (found := kind(folder))), None):
        return UnsupportedModel(f"{folder} is {strange.what}", hint=strange.hint)
    return None


def _adapter(folder: Path) -> Strange | None:
    if not (folder / "adapter_config.json").is_file() or any(folder.glob("model*.safetensors")):
        return None
    base = _keys(folder / "adapter_config.json").get("base_model_name_or_path") or "another model"
    return Strange(f"a LoRA adapter for {base}, not a model",
                   "Name its model, and this folder as `lora`. Or merge it and name the new folder: with peft, "
                   "AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder).")


def _mlx(folder: Path) -> Strange | None:
    keys = _keys(folder / "config.json")
    own = isinstance(keys.get("quantization"), dict) and "quant_method" not in (keys.get("quantization_config") or {})
    if not own and not any(folder.glob("weights*.npz")):
        return None
    return Strange("a quantised model of MLX, whose weights only MLX reads",
                   f"Use the original that it was made of, or a GGUF file of it. {_WEIGHTS}")


def _embeddings(folder: Path) -> Strange | None:
    if not any((folder / name).is_file() for name in ("modules.json", "config_sentence_transformers.json")):
        return None
    return Strange("a sentence-transformers model, which makes embeddings and says nothing",
                   "Name a model that generates text.")


def _diffusers(folder: Path) -> Strange | None:
    if not (folder / "model_index.json").is_file():
        return None
    return Strange("a diffusers pipeline, which makes pictures", "Name a model that generates text.")


def _several_gguf(folder: Path) -> Strange | None:
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if not files:
        return None
    return Strange(f"a folder of GGUF files: {_listed(files)}", f"Name one of them, such as {folder / files[0]}.")


def _having(what: str, hint: str, *patterns: str) -> Callable[[Path], Strange | None]:
    """A kind of folder that is told by files in it."""
    return lambda folder: Strange(what, hint) if any(any(folder.glob(one)) for one in patterns) else None


_KINDS: tuple[Callable[[Path], Strange | None], ...] = (
    _adapter, _embeddings, _diffusers, _several_gguf, _mlx,
    _having("a folder with a download that has not ended", "Run what fetched it again: it goes on where it was.",
            *(f"*{ending}" for ending in _UNFINISHED_NAMES), ".cache/huggingface/download/*.incomplete"),
    _having("a model in the format of Mistral, with all weights in consolidated.safetensors",
            "Use the files that transformers reads: config.json and model*.safetensors, mostly in the same repository.",
            "consolidated*.safetensors"),
    _having("a model in Meta's original format (consolidated.*.pth)",
            "Use the repository's files for transformers, or convert it: transformers has a script, "
            "convert_llama_weights_to_hf.py.", "consolidated*.pth", "consolidated*.pt"),
    _having("a model with PyTorch weights alone (pytorch_model.bin and the like), which can run code when they are "
            "read, and are never loaded", _SAVE_AGAIN, "pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt"),
    _having("a model for TensorFlow, Flax or Rust", _SAVE_AGAIN, "tf_model*", "flax_model*", "rust_model*"),
    _having("a model exported to ONNX or OpenVINO", _WEIGHTS, "*.onnx", "onnx/*.onnx", "*openvino*.xml"),
)


def _subfolders(folder: Path) -> list[Path]:
    """Where a model may be meant: folders at most two levels down (models--org--name/snapshots/COMMIT)."""
    return sorted({file.parent for pattern in ("*/config.json", "*/*/config.json", "*/*.gguf")
                   for file in folder.glob(pattern)})


def _listed(names: Iterable[object]) -> str:
    every = [str(name) for name in names]
    return ", ".join(every[:_SHOWN]) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")


def _keys(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
