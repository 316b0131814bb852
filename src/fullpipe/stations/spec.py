"""A spec describes a station so that any process can build it: a function's name and plain values.

A spec travels to a worker as it is. Nothing that executes on arrival (pickle) ever does, and a spec can
only name functions of this package: a worker builds what it is told, so it is told little.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from typing import Any

from fullpipe.errors import UsageError
from fullpipe.stations.base import DraftLike, StageLike


@dataclass(frozen=True, slots=True)
class StationSpec:
    """Describes a station that has not been built yet.

    builder: "fullpipe.module:function"; calling it with `args` gives a `StageLike` or a `DraftLike`.
    args: keyword arguments, plain JSON values (no tuples, no paths, string keys).

    Raises `UsageError` when the builder lies outside `fullpipe` or an argument is not plain JSON.
    """

    builder: str
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        module, colon, function = self.builder.partition(":")
        if not (colon and module.startswith("fullpipe.") and function.isidentifier()):
            raise UsageError(f"{self.builder!r} is not a builder of stations",
                             hint="A builder is written 'fullpipe.module:function'.")
        try:
            plain = json.loads(json.dumps(self.args)) == self.args
        except (TypeError, ValueError):
            plain = False
        if not plain:
            raise UsageError(f"the arguments of {self.builder} are not plain JSON values: {self.args!r}",
                             hint="Use dicts with string keys, lists, strings, numbers, booleans and None.")

    def build(self) -> StageLike | DraftLike:
        """Make the station in this process. Raises `UsageError` for a name that does not exist, and
        whatever the builder itself raises."""
        module, _, function = self.builder.partition(":")
        try:
            make = getattr(importlib.import_module(module), function)
        except (ModuleNotFoundError, AttributeError) as error:
            raise UsageError(f"there is no builder {self.builder}: {error}",
                             hint="Check the spelling, and that workers run the same version.") from error
        station: StageLike | DraftLike = make(**self.args)
        return station
