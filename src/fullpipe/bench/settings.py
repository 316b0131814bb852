"""What a benchmark runs: methods with their settings, and the sweep that finds each method's best. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from fullpipe.errors import UsageError
from fullpipe.methods import POLICIES, make_policy
from fullpipe.methods.base import Policy

CHAIN_DEPTHS = (2, 3, 4, 6, 8, 12, 16)
TREE_DEPTHS = (3, 5, 8, 12)
WIDTHS = (4, 8, 16, 32, 64)
_TREE_ROWS = 128  # trees of more nodes are not tried: SpecInfer, Sequoia and EAGLE-2 verify 16 to 128


@dataclass(frozen=True, slots=True)
class Setting:
    """A method and how it is set. draft: "none", or sources with commas between."""

    method: str
    draft: str
    width: int | None = None
    depth: int | None = None
    floor: float | None = None

    def policy(self) -> Policy:
        return make_policy(self.method, width=self.width, depth=self.depth, floor=self.floor)

    @property
    def key(self) -> tuple[str, str, int, int, float]:
        return self.method, self.draft, self.width or 0, self.depth or 0, self.floor or 0.0

    def __str__(self) -> str:
        parts = [self.method]
        parts += [f"width {self.width}"] if self.width is not None else []
        parts += [f"depth {self.depth}"] if self.depth is not None else []
        return ", ".join(parts) + (f", {self.draft}" if self.draft != "none" else "")


def candidates(method: str, drafts: Sequence[str], widths: Sequence[int],
               depths: Sequence[int] | None) -> list[Setting]:
    """All settings of a method worth trying. depths: None for the method's own range.

    Raises UsageError for an unknown method.
    """
    if method not in POLICIES:
        raise UsageError(f"unknown method {method!r}", hint=f"Methods are: {', '.join(POLICIES)}.")
    match method:
        case "pp":
            return [Setting("pp", "none")]
        case "chain":
            return [Setting(method, draft, None, depth)
                    for draft, depth in product(drafts, depths or CHAIN_DEPTHS)]
        case "static-tree":
            return [Setting(method, draft, width, depth)
                    for draft, width, depth in product(drafts, widths, depths or TREE_DEPTHS)
                    if width * depth <= _TREE_ROWS]
        case "spd" | "ppsd":
            return [Setting(method, draft, width) for draft, width in product(drafts, dict.fromkeys((1, *widths)))]
    return [Setting(method, draft, width) for draft, width in product(drafts, widths)]
