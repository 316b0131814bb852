"""`fullpipe models` says what can be had by name, and what is here."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fullpipe.cli import console
from fullpipe.hub import CATALOGUE, CatalogueModel, cache
from fullpipe.options import DEFAULT_MODEL


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the models of the catalogue: sizes, drafts, licences, and whether they are here."""
    entries = [_describe(model) for model in CATALOGUE.values()]
    if as_json:
        console.print_json({"cache": str(cache.home()), "default": DEFAULT_MODEL, "models": entries})
        return
    console.print_table(
        ("NAME", "MODEL", "SIZE", "DRAFT", "LICENCE", "HERE"),
        [
            (e["name"], e["title"], console.megabytes(e["size"]), e["draft"], e["licence"], _where(e))
            for e in entries
        ],
    )
    console.print_note(
        f"\nCache: {cache.home()} (set {cache.HOME_VARIABLE} to move it). "
        "Local GGUF files, safetensors folders and Hugging Face ids work wherever a name does."
    )


def _describe(model: CatalogueModel) -> dict[str, Any]:
    path = cache.model_file(model.name)
    here = path.is_file() and cache.has_stamp(path, model.sha256)
    partial = cache.partial_folder(model.name) / path.name
    return {
        "name": model.name,
        "title": model.title,
        "size": model.size,
        "draft": model.draft,
        "licence": model.licence,
        "sha256": model.sha256,
        "path": str(path) if here else None,
        "partial_bytes": partial.stat().st_size if partial.is_file() else 0,
    }


def _where(entry: dict[str, Any]) -> str:
    if entry["path"]:
        return "yes"
    return f"{entry['partial_bytes'] / entry['size']:.0%} fetched" if entry["partial_bytes"] else "no"
