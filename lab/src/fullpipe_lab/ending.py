"""How a study ends that is started as a module."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fullpipe.errors import FullpipeError


def run(main: Callable[[], None]) -> None:
    """Run a study; an error of ours ends it with one line, and with 1."""
    try:
        main()
    except FullpipeError as error:
        sys.exit(f"error: {error}")
