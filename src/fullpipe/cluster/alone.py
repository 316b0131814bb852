"""`choose` says for one process that does everything in turn whether guessing pays, with which draft, and how far.

Guess k tokens, one after the other, d seconds each; verify them and the root in one flight of k + 1 rows, which takes
the stage c(k + 1) seconds. If a guess is right with probability p, a round emits 1 + p + ... + p^k tokens, so a token
takes

    t(k) = (k d + c(k + 1)) / (1 + p + ... + p^k)

seconds, against c(1) without a draft. Guessing counts as paying where the least t(k) is below 90% of that: the
other 10% are a margin, for p differs from text to text. d and c are measured. p is not: 0.8 is what the default pair
shows (0.73 on a chat, 0.92 on code), and 0.15 what n-gram does, which costs next to nothing and has something to say
only where a text repeats itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from fullpipe.costs import Machine

_MODEL_P, _NGRAM_P = 0.8, 0.15
_MOST_DEPTH = 8
_PAYS_BELOW = 0.9
_NGRAM = "ngram"


@dataclass(frozen=True, slots=True)
class Choice:
    """Says who guesses, and how far ahead.

    drafts: who guesses; empty: nobody. depth: tokens guessed at a time. why: in one line.
    """

    drafts: tuple[str, ...]
    depth: int
    why: str


def choose(machine: Machine, drafts: tuple[str, ...], *, may_do_without: bool = True) -> Choice:
    """The quickest of the drafts together, n-gram alone if it is among them, and none (`may_do_without`)."""
    assert machine.stage is not None, "the stage was measured"
    plain = machine.stage(1)
    found = [_best(machine, drafts)]
    if may_do_without and _NGRAM in drafts and len(drafts) > 1:
        found.append(_best(machine, (_NGRAM,)))
    seconds, depth, best = min(found)
    saved = f"{1e3 * seconds:.1f} ms a token expected, {1e3 * plain:.1f} ms without a draft"
    if may_do_without and seconds >= _PAYS_BELOW * plain:
        return Choice((), 0, f"no draft pays in one process here ({saved}): going on without one")
    tokens = "1 token" if depth == 1 else f"{depth} tokens"
    return Choice(best, depth, f"guessing {tokens} at a time with {' and '.join(best)} ({saved})")


def _best(machine: Machine, drafts: tuple[str, ...]) -> tuple[float, int, tuple[str, ...]]:
    """Seconds per token with the best depth, that depth, and the drafts."""
    assert machine.stage is not None
    alone = drafts == (_NGRAM,)
    p, call = (_NGRAM_P, 0.0) if alone else (_MODEL_P, machine.draft(1) if machine.draft else 0.0)
    found = []
    for depth in range(1, _MOST_DEPTH + 1):
        tokens = sum(p**k for k in range(depth + 1))
        found.append(((depth * call + machine.stage(depth + 1)) / tokens, depth, drafts))
    return min(found)
