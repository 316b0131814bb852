"""Small random instances, against the best of a dense family of plans, chosen for each instance in hindsight.

An instance is up to three stages, a draft beside stage 0 or apart, random costs and links, and a draft that is right as
often as it says. Every plan decides the same things by fixed numbers: the rows of a flight, the least probability of a
row, for how many rows a flight is held while the draft has more to say; and there are `pp`, `chain` and `pipedec`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

from driving import TellingEngine
from fullpipe.costs import CostCurve, Machine
from fullpipe.messages import Drafted, Expansion, Landed, Part
from fullpipe.methods import Chosen, FullPipe, Load, Method, make_method
from fullpipe.pipeline.inprocess import InProcessPipeline
from fullpipe.pipeline.links import Link, Links
from fullpipe.request import Request, SamplingParams
from fullpipe.sequences.sequence import Sequence
from fullpipe.stations.drafts.scripted import ScriptedDraft
from fullpipe.stations.scripted import ScriptedStage, hash_token
from fullpipe.stations.table import SlotTable

SEED, INSTANCES, TOKENS = 13, 8, 50
TRUTH = {"kind": "hash", "vocab": 50, "seed": 3}


class Honest(ScriptedDraft):
    """Is right as often as it says: says something else at every place, around `accuracy`."""

    def _expand(self, table: SlotTable, part: Part, row: int, fanout: int) -> Expansion:
        path, truth = table.tail(part, row, 3), self._answer(table, part, row)
        easy, chance = (hash_token([*path, part.positions[row]], 1 << 20, self.seed + k) / (1 << 20) for k in (1, 2))
        first = self.accuracy ** (0.3 + 1.4 * easy)
        says = [first, 0.6 * (1 - first), 0.2 * (1 - first)]
        tokens = [(truth + 1 + k) % 50 for k in range(3)]
        rank = next((k for k in range(3) if chance < sum(says[: k + 1])), 3)
        tokens = [*tokens[:rank], truth, *tokens[rank:]][:3]
        return Expansion(part.nodes[row], tokens, [math.log(one) for one in says], [-1] * 3)


class Plan(FullPipe):
    """Knows no costs. hold: rows for which a flight waits while the draft is asked, or about to be."""

    name = "plan"

    def __init__(self, width: int, floor: float, hold: int) -> None:
        super().__init__(width=width, floor=floor)
        self.hold = hold

    def meet(self, machine: Machine) -> None:
        pass

    def observe(self, event: Landed | Drafted) -> None:
        pass

    def launch(self, sequences: list[Sequence], load: Load) -> Chosen:  # type: ignore[override]
        chosen = super().launch(sequences, load)
        for sequence, nodes in chosen:
            tree, root = sequence.tree, sequence.tree.root
            asks = load.asked_at is not None or (not root.asked and root.position < tree.horizon)
            if len(nodes) < self.hold and asks and tree.num_advances:
                for node in reversed(nodes):
                    tree.return_unlaunched(node)
                return []
        return chosen


def plans() -> Iterator[Method]:
    yield make_method("pp")
    for depth in (1, 2, 4, 8):
        yield make_method("chain", depth=depth)
    for width in (1, 2, 4):
        yield make_method("pipedec", width=width)
    for width, hold in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4), (8, 6)):
        for floor in (0.5, 0.2, 0.05):
            yield Plan(width, floor, hold)


@dataclass(frozen=True)
class Instance:
    machine: Machine
    accuracy: float
    seed: int

    @classmethod
    def drawn(cls, rng: random.Random) -> Instance:
        count, shared = rng.randint(1, 3), rng.random() < 0.5
        link = rng.choice([0.0, 0.1, 0.5, 2.0])
        stage = 1 / count
        dear = rng.choice([0.0, 0.02, 0.1, 0.3])  # of a flight's time, for each row more

        def curve(first: float) -> CostCurve:
            return CostCurve({rows: first * (1 + dear * (rows - 1) * (1 if rows < 8 else 1.3))
                              for rows in (1, 2, 4, 8, 16, 32)})

        machine = Machine(count, curve(stage), curve(stage * rng.choice([0.2, 0.6, 1.2])), link_s=count * stage * link,
                          shared=shared, draft_link_s=0.0 if shared else 2 * stage * link)
        return cls(machine, rng.choice([0.3, 0.6, 0.8, 0.95]), rng.randint(0, 99))

    def seconds(self, method: Method) -> float:
        """What an answer takes."""
        machine, count = self.machine, self.machine.num_stages
        link = Link(machine.link_s / count)

        def costs(station: str, rows: int, measured: float, context: int) -> float:
            curve = machine.draft if station == "draft" else machine.stage
            return curve(rows) if curve else 0.0

        pipeline = InProcessPipeline(
            [ScriptedStage(k, count, TRUTH) for k in range(count)], Honest(TRUTH, accuracy=self.accuracy,
                                                                          seed=self.seed),
            costs=costs, links=Links([link] * (count - 1), landing=link, draft=Link(machine.draft_link_s / 2)),
            device_of=lambda station: "stage 0" if machine.shared and station == "draft" else station)
        engine = TellingEngine(pipeline, method)
        engine.submit(Request(0, (4, 8, 15), SamplingParams(max_tokens=TOKENS)))
        while engine.busy:
            engine.step()
        return engine.figures[0].last_token or 0.0


def test_the_regret_is_small() -> None:
    rng = random.Random(SEED)
    regrets = []
    for instance in [Instance.drawn(rng) for _ in range(INSTANCES)]:
        own = instance.seconds(make_method("fullpipe", machine=instance.machine))
        best = min(instance.seconds(plan) for plan in plans())
        regrets.append(max(own / best - 1, 0.0))
    assert mean(regrets) <= 0.02 and max(regrets) <= 0.1, regrets
