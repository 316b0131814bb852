"""Events of scripted runs, for what is drawn from events."""

from __future__ import annotations

from driving import TellingEngine
from fullpipe.messages import Event
from fullpipe.methods import make_method, options_of
from fullpipe.pipeline.durations import Costs, unit_costs
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.request import Request, SamplingParams
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage

TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}
PROMPTS = ((4, 8, 15), (16, 23, 42))


def uneven(station: str, rows: int, measured: float, context: int) -> float:
    """Stages of different speed, so that rows die while they are computed."""
    return (0.7 + 0.2 * (len(station) + ord(station[-1])) % 0.5) * (1 + 0.05 * rows) if rows else 0.0


def recorded(method: str = "fullpipe", stages: int = 4, *, tokens: int = 30, accuracy: float = 0.6, width: int = 4,
             requests: int = 1, costs: Costs = unit_costs, stop_after: int | None = None) -> list[Event]:
    """What a listener hears of a run. stop_after: it ends in the middle, after so many engine steps."""
    pipeline = InProcessPipeline([ScriptedStage(k, stages, TRUTH) for k in range(stages)],
                                 ScriptedDraft(TRUTH, accuracy=accuracy, coverage=min(1.0, accuracy + 0.15)),
                                 costs=costs)
    events: list[Event] = []
    engine = TellingEngine(pipeline, make_method(method, **options_of(method, width=width)),
                    listeners=[events.append])
    for id in range(requests):
        engine.submit(Request(id, PROMPTS[id], SamplingParams(max_tokens=tokens)))
    steps = 0
    while engine.busy and steps != stop_after:
        engine.step()
        steps += 1
    if stop_after is None:
        engine.drain()
    return events
