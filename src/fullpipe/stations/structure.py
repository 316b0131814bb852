"""A matcher follows a request's paths at a station, and says what its structure lets come next.

What may follow a path is a function of the path: a matcher goes back to where two paths part and on from there, and
says what a new one would say. It is llguidance's; `models/tokens/matching.py` makes it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self
from weakref import WeakKeyDictionary

import numpy as np

from fullpipe.errors import FullpipeError, UsageError
from fullpipe.messages import Part
from fullpipe.models.tokens.matching import Guide
from fullpipe.request import Structured
from fullpipe.stations.bits import Bits, has_any, put
from fullpipe.stations.table import SlotTable

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Says where a path ends.

    length: how many of its tokens are answer. sure: how many of these, from the first on, are committed. tail: gives
    the path's last so many tokens, one at least.
    """

    length: int
    sure: int
    tail: Callable[[int], list[int]]

    @classmethod
    def of(cls, table: SlotTable, part: Part, row: int) -> Self:
        """Where the path of a row ends, its own token last."""
        length = part.positions[row] + 1 - table.prompt_len
        return cls(length, max(0, length - len(part.paths[row])), lambda count: table.tail(part, row, count))

    def last(self, count: int) -> list[int]:
        """The last tokens of the answer, so many or as many as there are."""
        count = min(count, self.length)
        return self.tail(count) if count > 0 else []

    def then(self, tokens: Sequence[int]) -> Place:
        """Where the same path ends with these tokens behind it."""
        def tail(count: int) -> list[int]:
            before = count - len(tokens)
            return [*(self.tail(before) if before > 0 else ()), *tokens[max(0, -before):]]

        return Place(self.length + len(tokens), self.sure, tail)


class CannotFollow(Exception):
    """A structure cannot be followed here any further. Its text says why, for who asked."""


class Walk:
    """Is where one request's matcher stands. The tokens of the answer that it has taken are kept, and of how many of
    them it is sure that they are committed.

    llguidance bounds the work that a matcher may take, over all the paths that it has been on. Where it gives up, a new
    one goes the path in question alone, and what that says counts.
    """

    def __init__(self, guide: Guide, structured: Structured) -> None:
        self._guide, self._structured = guide, structured
        self._given_up: dict[tuple[int, ...], CannotFollow] = {}
        self._begin()

    def _begin(self) -> None:
        self._matcher = self._guide.matcher(self._structured)
        self._said: list[int] = []
        self._sure = 0

    def _again(self, place: Place) -> None:
        """Raise what was found out before of this path, if it was given up: finding out takes long."""
        if self._given_up and (known := self._given_up.get(tuple(place.last(place.length)))):
            raise known

    def may_follow(self, place: Place) -> Bits | None:
        """Which tokens may follow; None where the path itself is none that may be. Raises CannotFollow, of a path on
        which nothing can be said, and of a committed one that the structure does not know."""
        self._again(place)
        found = self._following(place)
        if found is None and self._is_lost(place):
            self._begin()
            found = self._following(place)
            if found is None and self._is_lost(place):
                raise self._give_up(place)
        if found is not None and has_any(found, self._guide.ends):
            put(found, self._guide.ends, True)
        return found

    def allowed(self, place: Place, tokens: Sequence[int]) -> int:
        """How many of these tokens may follow, one behind the other. End tokens are not looked at."""
        if not self._go(place) or self._matcher.is_stopped():
            return 0
        words = [*tokens]
        end = next((at for at, token in enumerate(words) if token in self._guide.ends), len(words))
        count = int(self._matcher.validate_tokens(words[:end])) if end else 0
        return 0 if self._matcher.is_error() else count

    def _following(self, place: Place) -> Bits | None:
        """None where the matcher does not come to the end of the path, or fails there."""
        if not self._go(place):
            return None
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint8).copy()
        return None if self._matcher.is_error() else found

    def _is_lost(self, place: Place) -> bool:
        """Whether the matcher has failed, or knows no way along a text that is committed and not over."""
        over = self._matcher.is_stopped() or not self._guide.ends.isdisjoint(place.last(place.length))
        return self._matcher.is_error() or (place.sure == place.length and not over)

    def _give_up(self, place: Place) -> CannotFollow:
        """The next path begins anew (`_go`)."""
        why = " ".join(self._matcher.get_error().split("\n")[0].split())[:200] or "it does not allow what was said"
        if not self._given_up:
            log.warning("a structured text cannot go on: %s", why)
        given_up = self._given_up[tuple(place.last(place.length))] = CannotFollow(_TOO_COMPLEX.format(why))
        return given_up

    def _go(self, place: Place) -> bool:
        """Whether the matcher stands where the path ends now."""
        if self._matcher.is_error():
            self._begin()
        known = min(self._sure, place.sure)  # both paths begin with so many committed tokens
        wanted, here = place.last(place.length - known), self._said[known:]
        same = next((at for at, (ours, theirs) in enumerate(zip(here, wanted)) if ours != theirs),
                    min(len(here), len(wanted)))
        self._back(len(here) - same)
        self._sure = min(self._sure, len(self._said))
        there = self._on(wanted[same:])
        self._sure = max(self._sure, min(place.sure, len(self._said)))
        return there

    def _back(self, count: int) -> None:
        if count and not self._matcher.rollback(count):
            kept = self._said[:-count]
            self._begin()
            self._on(kept)
        elif count:
            del self._said[-count:]

    def _on(self, tokens: Sequence[int]) -> bool:
        for token in tokens:
            # What follows the end of a text is none of it. A matcher that has stopped would fail for good.
            if token in self._guide.ends or self._matcher.is_stopped() or not self._matcher.try_consume_tokens([token]):
                return False
            self._said.append(token)
        return True


_TOO_COMPLEX = ("it became too complex ({}); ask for a simpler one: patterns with long repetitions of much that "
                "overlaps are the costliest")


class Hopeless:
    """Stands for a walk where nobody can follow a structure, at a stage, which must."""

    def __init__(self, why: str) -> None:
        self._why = why

    def may_follow(self, place: Place) -> Bits | None:
        raise CannotFollow(self._why)

    def allowed(self, place: Place, tokens: Sequence[int]) -> int:
        return 0


Follower = Walk | Hopeless


class Structures:
    """Knows the walks of a station's requests.

    model: whose tokenizer reads texts; it is loaded with the first request that has a structure, or when nobody has
    loaded it in this process yet. None: there is none. vocab: number of real tokens. strict: a text whose structure
    cannot be followed here does not go on; a draft goes on without, and guesses worse.
    """

    def __init__(self, model: Path | None = None, vocab: int | None = None, *, strict: bool = True) -> None:
        self._model, self._vocab, self._strict = model, vocab, strict
        self._walks: WeakKeyDictionary[SlotTable, Follower | None] = WeakKeyDictionary()
        self._missing: str | None = None  # without which no text can be held to any structure here

    def walk(self, table: SlotTable) -> Follower | None:
        """That of a request; None where it has no structure, or is not followed here."""
        if table.params.structured is None:
            return None
        if table not in self._walks:
            self._walks[table] = self._made(table, table.params.structured)
        return self._walks[table]

    def _made(self, table: SlotTable, structured: Structured) -> Follower | None:
        why = self._missing
        try:
            if why is None:
                return Walk(self._guide(table), structured)
        except (FullpipeError, OSError) as error:
            why = self._missing = f"a station cannot follow structures: {error}".replace("\n", " ")
            log.log(logging.ERROR if self._strict else logging.WARNING, why)
        except ValueError as error:
            why = str(error)
        return Hopeless(why) if self._strict else None

    def _guide(self, table: SlotTable) -> Guide:
        if self._model is None:
            raise UsageError("this station knows no tokenizer", hint="Build it with its model.")
        with _loading:
            return _guide(self._model, self._vocab, table.ends)


_loading = threading.Lock()  # several pipelines of one process may run in threads of their own


@lru_cache(maxsize=4)
def _guide(model: Path, vocab: int | None, ends: tuple[int, ...]) -> Guide:
    from fullpipe.models.tokens.loading import load_tokenizer

    return Guide(load_tokenizer(model), vocab, ends)
