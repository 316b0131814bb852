"""The one loop: events in, flights out; who runs, what goes out, what is counted."""

from __future__ import annotations

from fullpipe.engine.engine import Engine
from fullpipe.engine.loop import Listener
from fullpipe.engine.stats import RequestStats, Stats, Totals

__all__ = ["Engine", "Listener", "RequestStats", "Stats", "Totals"]
