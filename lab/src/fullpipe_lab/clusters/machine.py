"""A method may know of an imagined cluster what the product measures of a real one."""

from __future__ import annotations

from collections.abc import Sequence

from fullpipe.costs import CostCurve, Machine
from fullpipe.live_costs import LiveMachine
from fullpipe_lab.clusters.cluster import Cluster, DraftCosts

_CONTEXT = 256  # tokens in the cache, where a cost curve is made


def machine_of(cluster: Cluster, drafts: Sequence[str]) -> Machine:
    """A new one each time, for its curves then follow what stations take, as in the product: more where a context is
    longer. Without curves where stations would have to run to be measured.

    drafts: named as for `DraftCosts`; "none", or nothing: there is no draft station.
    """
    costs, links = DraftCosts(cluster, drafts), cluster.links
    has_draft = any(name != "none" for name in drafts)
    stations = [f"stage {k}" for k in range(cluster.num_stages)]
    devices = [cluster.device_of(station) for station in stations]
    known = not cluster.is_measured
    return LiveMachine(Machine(
        cluster.num_stages, stages=[_curve(costs, station) for station in stations] if known else [],
        draft=_curve(costs, "draft") if known and has_draft else None, link_s=links.traversal_s,
        shared=has_draft and cluster.device_of("draft") == devices[0], draft_link_s=links.draft_s, devices=devices))


def _curve(costs: DraftCosts, station: str) -> CostCurve:
    return CostCurve.of(lambda rows: costs(station, rows, 0.0, _CONTEXT))
