"""The tokenizer of a directory as transformers writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from fullpipe.errors import UnsupportedModel
from fullpipe.models.recognise import damaged
from fullpipe.models.tokens.template import ChatTemplate
from fullpipe.models.tokens.tokenizer import Tokenizer


def directory_tokenizer(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise UnsupportedModel(
            f"{path} has no tokenizer.json",
            hint="Write one: transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise damaged(file, f"{file} cannot be read: {error}") from error
    # What was set for training batches; a prompt must come out whole and unpadded.
    backend.no_truncation()
    backend.no_padding()
    settings = _read_json(path / "tokenizer_config.json")
    source = _template_source(path, settings)
    eos_token = _token_text(settings.get("eos_token"))
    template = ChatTemplate(source, _token_text(settings.get("bos_token")), eos_token) if source else None
    return Tokenizer(backend, _end_ids(path, backend, eos_token), template, name=path.name)


def _end_ids(path: Path, backend: Any, eos_token: str | None) -> frozenset[int]:
    """The end tokens that any of the directory's three files names."""
    ends = {backend.token_to_id(eos_token)} if eos_token else set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(path / name).get("eos_token_id")
        ends.update(value if isinstance(value, list) else [value])
    return frozenset(ends - {None})


def _template_source(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template's text: a file of its own, or in the settings, alone or as the list's "default"."""
    if (file := path / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template") or _read_json(path / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _token_text(token: Any) -> str | None:
    """A token as settings files have it: a string, or an object around it."""
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object; empty when there is no such file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise damaged(path, f"{path} is not JSON: {error}") from error
