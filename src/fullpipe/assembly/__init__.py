"""From names and options to a running pipeline: resolve, check, cut, describe every station, start them, measure them.

    prepared = prepare(Options.of(model="smollm2-135m", stages=4))   # nothing heavy has been read yet
    pipeline = start(prepared)
    method = prepared.method(measured(prepared, pipeline))

`assemble` does all of it.
"""

from fullpipe.assembly.costs import measured
from fullpipe.assembly.made import Assembly, assemble, start
from fullpipe.assembly.prepare import MIXED_MIN_N, Prepared, draft_names, prepare, stage_ends

__all__ = ["MIXED_MIN_N", "Assembly", "Prepared", "assemble", "draft_names", "measured", "prepare", "stage_ends",
           "start"]
