"""The promise of a batching: how many rows of which request share the next flight and the next draft job.

A policy sees one tree; a batching sees all that run. It asks the policy where each request is to be treated by itself,
and chooses among all trees' nodes where they compete.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from fullpipe.methods.base import Policy
from fullpipe.sequences.sequence import Track
from fullpipe.sequences.tree import Node

Chosen = list[tuple[Track, list[Node]]]
"""Nodes by request, each request's in order: parents before children. Requests that get nothing are left out."""


class Batching(ABC):
    """Keeps no state of a request; what it remembers is of the machine."""

    @abstractmethod
    def launch(self, policy: Policy, tracks: Sequence[Track], prompt_rows: int, running: int,
               under_way: int) -> Chosen:
        """What enters stage 0 now. The caller launches all of it.

        tracks: whose root may enter, or has. prompt_rows: rows of prompts that the flight carries already. running: all
        requests, those whose prompt is still on its way included. under_way: flights that have not landed. Where a root
        waits and no flight is under way, something is chosen.
        """

    @abstractmethod
    def expand(self, policy: Policy, tracks: Sequence[Track]) -> Chosen:
        """What the draft looks at next. The caller asks for all of it."""

    def prompt_rows(self, chunk: int, deciding: int) -> int | None:
        """Rows of prompts in the next flight at most, at least 1. None: a `chunk` of each prompt.

        deciding: requests that are past their prompt and would be held up.
        """
        return None


class Separate(Batching):
    """Every request as if it were alone: the policy is asked for each in turn."""

    def launch(self, policy: Policy, tracks: Sequence[Track], prompt_rows: int, running: int,
               under_way: int) -> Chosen:
        return [(track, nodes) for track in tracks if (nodes := policy.launch(track.tree, track.room))]

    def expand(self, policy: Policy, tracks: Sequence[Track]) -> Chosen:
        return [(track, nodes) for track in tracks if (nodes := policy.expand(track.tree, track.room))]


def longest_waiting(tracks: Sequence[Track]) -> list[Track]:
    """Those first whose last token, or start, is longest ago."""
    return sorted(tracks, key=lambda track: (track.stats.last_token or track.stats.started, track.request.id))
