"""Several sources on one station, their guesses merged into one tree. No torch of its own."""

from __future__ import annotations

from collections.abc import Sequence

from fullpipe.messages import Expansion, Flight
from fullpipe.pipeline.spec import StationSpec
from fullpipe.pipeline.station import SourceLike


class Mix:
    """Asks every source and merges. Where several guess the same continuation it gets the highest of
    their probabilities: each of them is right about different tokens, and a node that enters the pipeline
    needlessly costs less than one that never does."""

    def __init__(self, sources: Sequence[SourceLike]) -> None:
        self._sources = list(sources)

    def run(self, job: Flight) -> list[Expansion]:
        answers: dict[int, list[Expansion]] = {}
        for source in self._sources:
            for expansion in source.run(job):
                answers.setdefault(expansion.node, []).append(expansion)
        return [merge(expansions) for expansions in answers.values()]


def merge(expansions: Sequence[Expansion]) -> Expansion:
    """One expansion of the same node that holds every guess once, chains included."""
    if len(expansions) == 1:
        return expansions[0]
    merged = Expansion(expansions[0].node, [], [], [])
    places: dict[tuple[int, int], int] = {}  # (parent index in the merged one, token) -> index
    for expansion in expansions:
        moved: list[int] = []
        for token, logprob, parent in zip(expansion.tokens, expansion.logprobs, expansion.parents):
            under = moved[parent] if parent >= 0 else -1
            index = places.setdefault((under, token), len(merged.tokens))
            if index == len(merged.tokens):
                merged.tokens.append(token)
                merged.logprobs.append(logprob)
                merged.parents.append(under)
            else:
                merged.logprobs[index] = max(merged.logprobs[index], logprob)
            moved.append(index)
    return merged


def build_mix(*, sources: list[dict[str, object]]) -> Mix:
    """Build every source of a list of station specs (as plain dictionaries)."""
    built = [StationSpec.from_dict(spec).build() for spec in sources]
    return Mix(built)  # type: ignore[arg-type]
