"""These options take numbers with commas between."""

from __future__ import annotations

import math

from fullpipe.errors import UsageError


def integers(text: str, option: str, *, least: int = 1) -> list[int]:
    """Raises UsageError naming the option for what is no list of whole numbers from `least` on."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [least - 1]
    if min(found) < least:
        raise UsageError(f"{option} takes whole numbers from {least} on with commas between (got {text!r})",
                         hint=f"For example {option} 1,2,4.")
    return found


def decimals(text: str, option: str) -> list[float]:
    """The same for numbers from 0 on."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(math.isfinite(number) and number >= 0 for number in found):
        raise UsageError(f"{option} takes numbers from 0 on with commas between (got {text!r})",
                         hint=f"For example {option} 0.5,1.")
    return found
