"""The algebra of ranges, against sets of single bytes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fullpipe.models.ranges import Range, chunks, merged, total, without

ranges = st.lists(st.builds(lambda file, start, size: Range(file, start, start + size), st.integers(0, 2),
                            st.integers(0, 40), st.integers(0, 15)), max_size=12)


def bytes_of(some: list[Range]) -> set[tuple[int, int]]:
    return {(one.file, at) for one in some for at in range(one.start, one.stop)}


def are_tidy(some: list[Range]) -> bool:
    """In order, not empty, and none touches the next."""
    return all(one.size > 0 for one in some) and all(
        a.file < b.file or (a.file == b.file and a.stop < b.start) for a, b in pairwise(some))


@given(ranges)
def test_merged_ranges_are_the_same_bytes_in_fewest_pieces(some: list[Range]) -> None:
    assert bytes_of(merged(some)) == bytes_of(some)
    assert are_tidy(merged(some))
    assert total(merged(some)) == len(bytes_of(some))


@given(ranges, ranges)
def test_without_is_the_difference_of_sets(some: list[Range], others: list[Range]) -> None:
    rest = without(some, others)
    assert bytes_of(rest) == bytes_of(some) - bytes_of(others)
    assert are_tidy(rest)


@given(ranges, ranges)
def test_what_is_missing_and_what_is_there_make_the_whole(some: list[Range], there: list[Range]) -> None:
    assert merged([*without(some, there), *there]) == merged([*some, *there])


@given(ranges, st.integers(1, 20))
def test_chunks_are_the_same_bytes_in_order_and_none_is_too_large(some: list[Range], size: int) -> None:
    pieces = list(chunks(merged(some), size))
    assert bytes_of(pieces) == bytes_of(some) and total(pieces) == len(bytes_of(some))
    assert pieces == sorted(pieces)
    assert all(0 < piece.size <= size for piece in pieces)
