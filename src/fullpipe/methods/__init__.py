"""Which nodes enter next: one file per method."""

from __future__ import annotations

from typing import Any

from fullpipe.costs import Machine
from fullpipe.errors import UsageError
from fullpipe.methods.base import PROBABILITY_FLOOR, Chosen, Load, Method, PerTree, RefreshingMethod
from fullpipe.methods.fullpipe import FullPipe
from fullpipe.methods.pipedec import PipeDec
from fullpipe.methods.pp import PlainPipeline
from fullpipe.methods.ppsd import Ppsd
from fullpipe.methods.spd import Spd
from fullpipe.methods.static_tree import Chain, StaticTree

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (PlainPipeline, Chain, StaticTree, PipeDec, Spd, Ppsd, FullPipe)
}
WITH_DEPTH = tuple(name for name, method in METHODS.items() if issubclass(method, StaticTree))
WITH_REFRESH = tuple(name for name, method in METHODS.items() if issubclass(method, RefreshingMethod))
# Options that not all methods have: flights of pp and chain have no shape to choose.
OF_SOME = {"width": tuple(name for name in METHODS if name not in (PlainPipeline.name, Chain.name)),
           "floor": tuple(name for name in METHODS if name != PlainPipeline.name),
           "depth": WITH_DEPTH, "refresh": WITH_REFRESH, "prefill_share": (FullPipe.name,)}


def make_method(name: str, *, width: int | None = None, depth: int | None = None, floor: float | None = None,
                refresh: bool | None = None, prefill_share: float | None = None,
                machine: Machine | None = None) -> Method:
    """Make the method of that name; None means its default.

    `OF_SOME` names the options that not all methods have. machine: what is known of the stations.

    Raises UsageError on an unknown method, on values out of range, and on an option that the method does not have.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}", hint=f"Methods are: {', '.join(METHODS)}.")
    if width is not None and width < 1:
        raise UsageError(f"width must be 1 or more (got {width})",
                         hint="The width is the number of tree nodes in a flight.")
    options: dict[str, Any] = {"width": width, "floor": floor, "depth": depth, "refresh": refresh or None,
                               "prefill_share": prefill_share}
    for option, methods in OF_SOME.items():
        if options[option] is not None and name not in methods:
            raise UsageError(f"the method {name} has no {option} (got {options[option]})",
                             hint=f"Leave it out, or use one of: {', '.join(methods)}.")
    return METHODS[name](machine=machine, **{key: value for key, value in options.items() if value is not None})


def options_of(name: str, **options: Any) -> dict[str, Any]:
    """Leave out the options that the method does not have."""
    return {key: value for key, value in options.items() if name in OF_SOME.get(key, (name,))}


__all__ = ["METHODS", "OF_SOME", "PROBABILITY_FLOOR", "WITH_DEPTH", "WITH_REFRESH", "Chain", "Chosen", "FullPipe",
           "Load", "Method", "PerTree", "PipeDec", "PlainPipeline", "Ppsd", "RefreshingMethod", "Spd", "StaticTree",
           "make_method", "options_of"]
