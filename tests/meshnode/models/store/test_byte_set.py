"""Sets of bytes as ranges, against sets of numbers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from meshnode.models.store.byte_set import ByteSet

RANGE = st.tuples(st.integers(0, 40), st.integers(0, 40))
STEPS = st.lists(st.tuples(st.booleans(), RANGE), max_size=12)


@given(STEPS, RANGE)
def test_ranges_say_what_a_set_of_numbers_says(
    steps: list[tuple[bool, tuple[int, int]]], asked: tuple[int, int]
) -> None:
    found, expected = ByteSet(), set[int]()
    for adds, (start, stop) in steps:
        if adds:
            found.add(start, stop)
            expected |= set(range(start, stop))
        else:
            found.remove(start, stop)
            expected -= set(range(start, stop))
    assert {n for start, stop in found for n in range(start, stop)} == expected
    ranges = list(found)
    assert ranges == sorted(ranges)
    assert all(one[1] < two[0] for one, two in pairwise(ranges)), "joined"
    wanted = set(range(*asked))
    assert {n for start, stop in found.gaps(*asked) for n in range(start, stop)} == (
        wanted - expected
    )
    assert {n for start, stop in found.parts(*asked) for n in range(start, stop)} == (
        wanted & expected
    )
    assert found.covers(*asked) == (wanted <= expected)
