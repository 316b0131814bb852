"""A draft goes on by itself, along the likeliest chain of its own guesses (`messages.Part.ahead`). No torch."""

from __future__ import annotations

from collections.abc import Callable

from fullpipe.messages import Expansion, Part


def go_on(part: Part, row: int, expansion: Expansion, least: float,
          ask: Callable[[Part], tuple[list[int], list[float]]]) -> None:
    """Guess further behind the row that the expansion is about, a step at a time, while there are slots and the chain
    is likely enough.

    ask: computes a part of one row and says what follows it, the likeliest first. least: see `Flight.least`.
    """
    best, chain = 0, 0.0
    for step in range(len(part.ahead)):
        if best == len(expansion.tokens):  # nothing follows
            return
        chain += min(expansion.logprobs[best], 0.0)
        if chain < least:
            return
        tokens, logprobs = ask(chain_rows(part, row, [expansion.tokens[best]], step))
        expansion.computed.append(best)
        expansion.parents += [best] * len(tokens)
        best = len(expansion.tokens)
        expansion.tokens += tokens
        expansion.logprobs += logprobs


def chain_rows(part: Part, row: int, tokens: list[int], first: int = 0) -> Part:
    """Make a part of the rows that a chain behind a row of `part` takes, from step `first` on."""
    steps = range(first, first + len(tokens))
    return Part(part.arena, [], [-1] * len(tokens), tokens, [part.positions[row] + 1 + step for step in steps],
                [part.ahead[step] for step in steps], [[*part.paths[row], *part.ahead[: step + 1]] for step in steps],
                [True] * len(tokens))
