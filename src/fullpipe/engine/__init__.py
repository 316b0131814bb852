"""The one loop: events in, flights out; who runs, what goes out, what is counted."""

from __future__ import annotations

from fullpipe.engine.loop import Engine, Listener
from fullpipe.engine.stats import RequestStats, Stats, Totals

__all__ = ["Engine", "Listener", "RequestStats", "Stats", "Totals"]
