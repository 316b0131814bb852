"""What is measured: methods, loads, and how each is set up on a cluster."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import fullpipe
from fullpipe.batching import Balanced, Batching, CostCurve, Dynamic, Equal, Separate
from fullpipe.bench.crowd import MakeEngine, Schedule, closed, poisson
from fullpipe.bench.run import code_digest
from fullpipe.engine.loop import Engine
from fullpipe.methods import make_policy
from fullpipe.planning.cluster import Cluster

MOST_ROWS, MOST_DRAFT_ROWS = 96, 64  # of a flight and a draft job under dynamic batching
DYNAMIC, PLAIN, ALONE = "dynamic", "pp", "one-after-another"
METHODS = {
    DYNAMIC: f"fullpipe, the rows that are worth most over all requests, {MOST_ROWS} a flight at most and "
             f"{MOST_DRAFT_ROWS} a draft job",
    "equal": "fullpipe, each request the same share of the rows that are free",
    "separate": "fullpipe, each request its full width whatever the others do",
    ALONE: "fullpipe, one request at a time, the others wait",
    PLAIN: "no guessing; as many requests in each flight as keep all stages equally busy",
    "pp-bunched": "no guessing; every request that has a token to send is in the next flight",
    "pp-one-after-another": "no guessing, one request at a time, the others wait",
}
AT_ONCE = (1, 2, 4, 8, 16, 32)
RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
WIDTH = 32  # the best that was found for one request on gpus-8 (bench/reports/gpus)
MOST_AT_ONCE = 64  # requests that are admitted of those that have come
ARRIVED = 60  # requests of an open loop
_CURVE_CONTEXT = 256
_FREE = 1.02  # a flight that takes so much longer than one of a single row: rows up to there are called free


@dataclass(frozen=True, slots=True)
class Cell:
    """load: `amount` requests at once ("closed"), or so many a second that come when they come ("poisson")."""

    method: str
    load: Literal["closed", "poisson"]
    amount: float
    temperature: float = 0.0
    seed: int = 0

    @property
    def key(self) -> str:
        return f"T{self.temperature:g}/{self.load}-{self.amount:g}/seed{self.seed}/{self.method}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def requests(self, prompts: int) -> int:
        """Every prompt equally often, and at least three times as many requests as there are places."""
        least = ARRIVED if self.load == "poisson" else 3 * int(self.amount)
        return prompts * -(-least // prompts)

    def schedule(self, prompts: int) -> Schedule:
        count = self.requests(prompts)
        return closed(count, int(self.amount)) if self.load == "closed" else poisson(count, self.amount, self.seed)


def all_cells(methods: Sequence[str], at_once: Sequence[int], rates: Sequence[float], temperature: float = 0.0,
              seed: int = 0) -> list[Cell]:
    """Load by load, so that what is compared is measured by the same code."""
    loads = [("closed", float(count)) for count in at_once] + [("poisson", rate) for rate in rates]
    return [Cell(method, load, amount, temperature, seed)  # type: ignore[arg-type]
            for load, amount in loads for method in methods]


def needs_draft(method: str) -> bool:
    return not method.startswith("pp")


def stage_curve(cluster: Cluster) -> CostCurve:
    """Of the slowest stage."""
    stages = range(cluster.num_stages)
    return CostCurve.slowest(CostCurve.of(lambda rows, k=k: cluster.stage_seconds(k, rows, _CURVE_CONTEXT))
                             for k in stages)


def batching(method: str, cluster: Cluster) -> Batching:
    curve = stage_curve(cluster)
    match method:
        case "dynamic":
            links = cluster.links
            hops = sum(link.latency_s for link in (*links.stage_hops, links.to_first, links.landing))
            draft = CostCurve.of(lambda rows: cluster.draft_seconds(rows, _CURVE_CONTEXT))
            return Dynamic(curve, num_stages=cluster.num_stages, draft_costs=draft, link_s=hops,
                           max_rows=MOST_ROWS, max_draft_rows=MOST_DRAFT_ROWS)
        case "equal":
            return Equal(max(1, curve.most_rows(_FREE * curve(1), 256)))
        case "pp":
            return Balanced(cluster.num_stages)
    return Separate()


def make_engine(method: str, cluster: Cluster) -> MakeEngine:
    policy = make_policy("fullpipe", width=WIDTH) if needs_draft(method) else make_policy("pp")
    places = 1 if method.endswith("one-after-another") else MOST_AT_ONCE
    return lambda pipeline, listeners: Engine(pipeline, policy, batching=batching(method, cluster),
                                              max_num_seqs=places, listeners=listeners)


def version() -> str:
    """Of the code that decides what a cell measures."""
    package = Path(fullpipe.__file__).parent
    files = [*sorted((package / "batching").glob("*.py")), package / "bench" / "crowd.py", Path(__file__)]
    digest = hashlib.sha256(code_digest().encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
