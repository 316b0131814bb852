"""The links of a cluster by which hidden states go to its draft."""

from __future__ import annotations

from pathlib import Path

import pytest

from fullpipe.pipeline.links import Link
from fullpipe_lab.clusters import Cluster

CLUSTER = """
[cluster]
name = "three"
kind = "modelled"
[[devices]]
name = "board"
count = 3
stage_ms = [[1, 1.0]]
[[devices]]
name = "drafter"
draft_ms = [[1, 1.0]]
[links]
{links}
[placement]
stages = ["board0", "board1", "board2"]
draft = "{draft}"
"""


def _pair(a: str, b: str, latency: float, mbit: float) -> str:
    return f'[[links.pair]]\nends = ["{a}", "{b}"]\nlatency_ms = {latency}\nbandwidth_mbit_s = {mbit}\n'


def test_taps_of_a_cluster_go_where_its_draft_is() -> None:
    text = CLUSTER.format(links="latency_ms = 2.0\n" + _pair("board1", "drafter", 5.0, 100), draft="drafter")
    links = Cluster.parse(text, "here", Path()).links
    assert links.taps == [Link.of(2.0), Link.of(5.0, 100), Link.of(2.0)]


def test_taps_without_a_link_of_their_own_go_the_flights_way() -> None:
    pairs = (_pair("board0", "board1", 1.0, 1000) + _pair("board1", "board2", 2.0, 300)
             + _pair("board2", "board0", 4.0, 1000) + _pair("board0", "drafter", 8.0, 500))
    links = Cluster.parse(CLUSTER.format(links=pairs, draft="drafter"), "here", Path()).links
    assert links.taps[0] == Link.of(8.0, 500)
    assert [link.latency_s for link in links.taps[1:]] == pytest.approx([0.014, 0.012])
    assert [link.bandwidth for link in links.taps[1:]] == [Link.of(mbit=300).bandwidth, Link.of(mbit=500).bandwidth]
