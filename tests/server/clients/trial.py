"""What a client's script tries, told in a line of JSON each. Runs in the client's own environment: the standard library
alone."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Trials:
    """Notes what was tried, and what went wrong.

    url: of the server, without /v1. model: as the server calls it. folder: to write into; the model's tokenizer lies in
    its folder `tokenizer`, as transformers reads it.
    """

    def __init__(self) -> None:
        self.url, self.model, folder = sys.argv[1:4]
        self.folder = Path(folder)
        self.failed = False

    @property
    def base(self) -> str:
        return f"{self.url}/v1"

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Around one thing that is tried; whatever it raises is noted, and the next is tried."""
        fault = ""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            fault = " ".join(f"{type(error).__name__}: {error}".split())[:400] or "it failed"
        self.failed |= bool(fault)
        print(json.dumps({"tried": what, "fault": fault}), flush=True)

    def end(self) -> None:
        """Leave, with 1 where something went wrong."""
        sys.exit(1 if self.failed else 0)
