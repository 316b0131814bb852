"""Which nodes enter next: one file per method."""

from __future__ import annotations

from fullpipe.errors import UsageError
from fullpipe.policies.base import PROBABILITY_FLOOR, Policy
from fullpipe.policies.fullpipe import FullPipe
from fullpipe.policies.pipedec import PipeDec
from fullpipe.policies.pp import PlainPipeline
from fullpipe.policies.static_tree import Chain, StaticTree

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (PlainPipeline, Chain, StaticTree, PipeDec, FullPipe)
}


def make_policy(method: str, *, width: int | None = None, depth: int | None = None,
                floor: float | None = None) -> Policy:
    """The policy of that name; options it does not have are ignored, None means its default.

    Raises UsageError on an unknown method.
    """
    if method not in POLICIES:
        raise UsageError(f"unknown method {method!r}", hint=f"Methods are: {', '.join(POLICIES)}.")
    if width is not None and width < 1:
        raise UsageError(f"width must be 1 or more (got {width})",
                         hint="The width is the number of tree nodes in a flight.")
    options: dict[str, int | float] = {}
    if width is not None:
        options["width"] = width
    if floor is not None:
        options["floor"] = floor
    if depth is not None and issubclass(POLICIES[method], StaticTree):
        options["depth"] = depth
    return POLICIES[method](**options)  # type: ignore[arg-type]


__all__ = ["POLICIES", "PROBABILITY_FLOOR", "Chain", "FullPipe", "PipeDec", "PlainPipeline", "Policy",
           "StaticTree", "make_policy"]
