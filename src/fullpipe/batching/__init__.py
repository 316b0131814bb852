"""Whose rows share a flight: one file per way."""

from __future__ import annotations

from fullpipe.batching.base import Batching, Separate
from fullpipe.batching.dynamic import Dynamic
from fullpipe.batching.static import Balanced, Equal
from fullpipe.costs import CostCurve

__all__ = ["Balanced", "Batching", "CostCurve", "Dynamic", "Equal", "Separate"]
