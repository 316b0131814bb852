"""The live line, drawn from events."""

from fullpipe.cli.watch import PipelineLine
from fullpipe.messages import Died, Emitted, Landed, Launched


def test_the_line_shows_live_rows_newest_flight_first() -> None:
    line = PipelineLine(stages=3, width=4)
    line(Launched(0.0, 0, [1], [-1], [7], [0]))
    line(Launched(1.0, 1, [2, 3, 4, 5], [1, 1, 1, 1], [8, 9, 10, 11], [1, 1, 1, 1]))
    assert line.line().startswith("stages |█▂ |   5 live rows in flight   0 tokens")
    line(Landed(2.0, 0, [1], [8], [], []))
    line(Emitted(2.0, 0, 1, 8, 1, hit=True))
    line(Died(2.0, 0, [3, 4, 5]))
    assert line.line() == "stages |▂  |   1 live rows in flight   1 tokens, 1 already in flight when needed"
