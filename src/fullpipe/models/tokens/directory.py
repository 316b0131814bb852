"""The tokenizer of a directory as transformers writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers

from fullpipe.errors import DamagedModel, UnsupportedModel
from fullpipe.models.recognise import damaged, strange_file
from fullpipe.models.tokens.piece_file import read_pieces
from fullpipe.models.tokens.pieces import Kind, piece_tokenizer
from fullpipe.models.tokens.special import put_around
from fullpipe.models.tokens.template import ChatTemplate
from fullpipe.models.tokens.tokenizer import Tokenizer


def directory_tokenizer(path: Path) -> Tokenizer:
    settings = _settings(path)
    if (path / "tokenizer.json").is_file():
        backend = _from_json(path / "tokenizer.json")
    elif (path / "tokenizer.model").is_file():
        backend = _from_pieces(path / "tokenizer.model", settings)
    else:
        raise UnsupportedModel(
            f"{path} has no tokenizer.json and no tokenizer.model",
            hint="Write one: transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
        )
    _add_declared(path, backend, settings)
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
    source, named = _template_source(path, settings), _named_tokens(settings)
    template = ChatTemplate(source, named) if source else None
    return Tokenizer(backend, _end_ids(path, backend, named.get("eos_token")), template, named, name=path.name)


def _settings(path: Path) -> dict[str, Any]:
    """What tokenizer_config.json says. The older special_tokens_map.json goes before it where it lists no added tokens,
    and added_tokens.json then stands for that list."""
    settings = _read_json(path / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _read_json(path / "special_tokens_map.json")
        ids = _read_json(path / "added_tokens.json")
        special = _named_special(settings)
        settings["added_tokens_decoder"] = {
            id: {"content": token, "special": token in special, "normalized": token not in special}
            for token, id in ids.items()
        }
    return settings


def _from_json(file: Path) -> Any:
    """What goes around plain text stands in this file, whatever add_bos_token and add_eos_token say beside it: so it is
    in transformers."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise damaged(file, f"{file} cannot be read: {error}") from error
    # What was set for training batches; a prompt must come out whole and unpadded.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _from_pieces(file: Path, settings: dict[str, Any]) -> Any:
    """Sentencepiece's own file; its BOS and EOS are written into the settings, where these name none."""
    read = read_pieces(file)
    pieces = read.pieces
    if settings.get("add_prefix_space") is False:
        pieces = replace(pieces, prefix="never")
    elif settings.get("legacy") is False and pieces.prefix == "always":
        pieces = replace(pieces, prefix="first")
    backend = piece_tokenizer(pieces)
    control = [*pieces.of_kind(Kind.CONTROL), *pieces.of_kind(Kind.UNKNOWN)]
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in control])
    around: list[tuple[str, int] | None] = []
    for name, id, usual in (("bos", read.begin, True), ("eos", read.end, False)):
        if id is not None and settings.get(f"{name}_token") is None:
            settings[f"{name}_token"] = pieces.tokens[id]
        token = _token_text(settings, f"{name}_token")
        found = backend.token_to_id(token) if token and settings.get(f"add_{name}_token", usual) else None
        around.append(None if token is None or found is None else (token, found))
    put_around(backend, *around)
    return backend


def _add_declared(path: Path, backend: Any, settings: Mapping[str, Any]) -> None:
    """Tokens that the settings list and the tokenizer's own file does not, as transformers adds them."""
    declared = sorted((int(id), dict(token)) for id, token in (settings.get("added_tokens_decoder") or {}).items())
    raw = {"normalized": False} if not (path / "tokenizer.json").is_file() else {}
    for id, token in declared:
        if backend.token_to_id(token["content"]) is None:
            backend.add_tokens([tokenizers.AddedToken(**_attributes(token) | raw)])
            if (given := backend.token_to_id(token["content"])) != id:
                raise DamagedModel(f"{path} declares the token {token['content']!r} with the id {id}; in its tokenizer "
                                   f"it would be {given}", hint="Fetch the model again, or correct the settings.")
        else:
            backend.add_tokens([tokenizers.AddedToken(**_attributes(token))])
    backend.add_special_tokens([
        tokenizers.AddedToken(**_attributes(token) | {"special": True}) for token in _named_special(settings).values()
    ])


def _attributes(token: Mapping[str, Any]) -> dict[str, Any]:
    return {key: token[key] for key in ("content", "special", "lstrip", "rstrip", "single_word", "normalized")
            if key in token}


def _named_special(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By their text: tokens that a key such as bos_token names, and the lists of more."""
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named = [value for key, value in sorted(settings.items()) if key.endswith("_token")]
    tokens = [*named, *(more.values() if isinstance(more, dict) else more)]
    described: list[dict[str, Any]] = [
        {"content": token, "normalized": False} if isinstance(token, str) else token
        for token in tokens if isinstance(token, str | dict)
    ]
    return {token["content"]: token for token in described}


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
        return _read_template(file)
    template = settings.get("chat_template") or _read_json(path / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    if template is None or isinstance(template, str):
        return template
    raise DamagedModel(f"{path} has a chat template that is no text: {str(template)[:60]}",
                       hint="Fetch the model again, or correct the settings.")


def _read_template(file: Path) -> str:
    if strange := strange_file(file):
        raise DamagedModel(f"{file} is {strange.what}", hint=strange.hint)
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise damaged(file, f"{file} is not UTF-8: {error}") from error


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name, as transformers tells them to templates: bos_token, pad_token, and what a model has of
    its own."""
    extra = settings.get("extra_special_tokens")
    names = [key for key, value in settings.items() if key.endswith("_token") and not isinstance(value, bool)]
    own = {name: text for name, token in extra.items() if (text := _text_of(token))} if isinstance(extra, dict) else {}
    return {name: text for name in names if (text := _token_text(settings, name)) is not None} | own


def _token_text(settings: Mapping[str, Any], key: str) -> str | None:
    """A token as settings files have it: a string, or an object around it."""
    token = settings.get(key)
    text = _text_of(token)
    if text is None or isinstance(text, str):
        return text
    raise DamagedModel(f"{key} of the tokenizer's settings is {token!r}, and a token's text is wanted",
                       hint="Name one token there; more go into `generation_config.json`, as its eos_token_id.")


def _text_of(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object; empty when there is no such file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise damaged(path, f"{path} is not JSON: {error}") from error
