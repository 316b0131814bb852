"""Which nodes enter next: one file per method."""

from __future__ import annotations

from fullpipe.errors import UsageError
from fullpipe.methods.base import PROBABILITY_FLOOR, Policy, RefreshingPolicy
from fullpipe.methods.fullpipe import FullPipe
from fullpipe.methods.pipedec import PipeDec
from fullpipe.methods.pp import PlainPipeline
from fullpipe.methods.ppsd import Ppsd
from fullpipe.methods.spd import Spd
from fullpipe.methods.static_tree import Chain, StaticTree

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (PlainPipeline, Chain, StaticTree, PipeDec, Spd, Ppsd, FullPipe)
}
WITH_DEPTH = tuple(name for name, policy in POLICIES.items() if issubclass(policy, StaticTree))
WITH_REFRESH = tuple(name for name, policy in POLICIES.items() if issubclass(policy, RefreshingPolicy))


def make_policy(method: str, *, width: int | None = None, depth: int | None = None,
                floor: float | None = None, refresh: bool | None = None) -> Policy:
    """The policy of that name; None means its default.

    A width is ignored by pp and chain, a floor by pp: their flights have no shape to choose. A depth is for the
    methods `WITH_DEPTH` alone, a refresh for `WITH_REFRESH`.

    Raises UsageError on an unknown method, on values out of range, and on a depth or a refresh for a method without.
    """
    if method not in POLICIES:
        raise UsageError(f"unknown method {method!r}", hint=f"Methods are: {', '.join(POLICIES)}.")
    if width is not None and width < 1:
        raise UsageError(f"width must be 1 or more (got {width})",
                         hint="The width is the number of tree nodes in a flight.")
    if depth is not None and method not in WITH_DEPTH:
        raise UsageError(f"the method {method} has no depth (got {depth})",
                         hint=f"Leave the depth out, or use one of: {', '.join(WITH_DEPTH)}.")
    if refresh and method not in WITH_REFRESH:
        raise UsageError(f"the method {method} cannot refresh proposals",
                         hint=f"Leave the refresh out, or use one of: {', '.join(WITH_REFRESH)}.")
    options: dict[str, int | float] = {}
    if width is not None:
        options["width"] = width
    if floor is not None:
        options["floor"] = floor
    if depth is not None:
        options["depth"] = depth
    if refresh is not None and method in WITH_REFRESH:
        options["refresh"] = refresh
    return POLICIES[method](**options)  # type: ignore[arg-type]


__all__ = ["POLICIES", "PROBABILITY_FLOOR", "WITH_DEPTH", "WITH_REFRESH", "Chain", "FullPipe", "PipeDec",
           "PlainPipeline", "Policy", "Ppsd", "RefreshingPolicy", "Spd", "StaticTree", "make_policy"]
