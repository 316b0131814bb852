"""A verb fetches here what it is about to load."""

from __future__ import annotations

from fullpipe import hub
from fullpipe.cli import console
from fullpipe.options import ModelOptions
from fullpipe.stations.drafts.names import module_folder


def fetch_all(options: ModelOptions, method: str = "auto") -> None:
    """Fetch what is missing, with a progress bar, before anything is loaded."""
    from fullpipe.assembly import draft_names

    names = [options.model]
    if method != "pp" or options.draft != "auto":
        names += [name for name in draft_names(options.model, options.draft)
                  if name != "ngram" and not module_folder(name)]
    with console.TransferBar() as bar:
        for name in names:
            hub.resolve(name, progress=bar)
