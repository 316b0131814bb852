"""What the last stage says of prompts is gathered here until all of one is known.

A request that is sent back, or goes on with another pipeline, has its prompt computed again: what is said twice is the
same.
"""

from __future__ import annotations

from collections.abc import Iterable

from fullpipe.errors import PipelineError
from fullpipe.messages import Landed, Scored
from fullpipe.sequences.sequence import Sequence


def gathered(landed: Landed, running: Iterable[Sequence]) -> list[tuple[int, list[Scored]]]:
    """Take in what a landing says of prompts. Returns request and scores, by position from 1 on, of each prompt of
    which all is known now. Raises PipelineError for what cannot be said of a prompt."""
    if not landed.prompts:
        return []
    sequences = {one.arena: one for one in running}
    touched: dict[int, Sequence] = {}
    for score in landed.prompts:
        if (sequence := sequences.get(score.arena)) and sequence.scored:  # else it has ended, or was sent back
            _check(score, sequence)
            sequence.scores[score.position] = score
            touched[sequence.request.id] = sequence
    return [(id, _taken(one)) for id, one in touched.items() if len(one.scores) == one.num_prompt - 1]


def _check(score: Scored, sequence: Sequence) -> None:
    inside = 0 < score.position < sequence.num_prompt
    if not inside or not score.told or score.told[0][0] != sequence.tokens[score.position]:
        raise PipelineError(f"the last stage speaks of position {score.position} of a prompt that is another there")


def _taken(sequence: Sequence) -> list[Scored]:
    scores, sequence.scores = sequence.scores, {}
    return [scores[position] for position in range(1, sequence.num_prompt)]
