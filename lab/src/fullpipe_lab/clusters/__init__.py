"""Clusters that are imagined: described in a file, played on the virtual clock."""

from __future__ import annotations

from fullpipe_lab.clusters.cluster import Cluster, DraftCosts, presets, unit_cluster

__all__ = ["Cluster", "DraftCosts", "presets", "unit_cluster"]
