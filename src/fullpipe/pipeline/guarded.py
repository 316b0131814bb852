"""What nobody else is to suffer from is guarded: it is logged, and all goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import ParamSpec

log = logging.getLogger(__name__)

P = ParamSpec("P")


def guarded(what: str, act: Callable[P, object], *values: P.args, **named: P.kwargs) -> None:
    """Call somebody whose failure is nobody else's: it is logged. what: is done there."""
    try:
        act(*values, **named)
    except Exception:
        log.exception("%s failed", what)
