"""Clusters that are imagined: described in a file, played on the virtual clock."""

from __future__ import annotations

from fullpipe_lab.clusters.cluster import Cluster, DraftCosts, presets, unit_cluster
from fullpipe_lab.clusters.machine import machine_of

__all__ = ["Cluster", "DraftCosts", "machine_of", "presets", "unit_cluster"]
