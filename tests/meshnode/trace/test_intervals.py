from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshnode.trace.axis import ticks
from meshnode.trace.intervals import cut, intersect, length, merge, subtract
from meshnode.trace.wording import bytes_text, ms_number

intervals = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 20)).map(lambda pair: (pair[0], sum(pair)))
)


def instants(some: list[tuple[int, int]]) -> set[int]:
    return {instant for begin, end in some for instant in range(begin, end)}


@given(intervals, intervals)
def test_stretches_of_time_are_sets_of_instants(
    one: list[tuple[int, int]], other: list[tuple[int, int]]
) -> None:
    assert instants(merge(one)) == instants(one)
    assert instants(subtract(one, other)) == instants(one) - instants(other)
    assert instants(intersect(one, other)) == instants(one) & instants(other)
    assert instants(cut(one, 10, 30)) == instants(one) & set(range(10, 30))
    assert length(merge(one)) == len(instants(one))


def test_what_is_nearly_one_becomes_one() -> None:
    assert merge([(5, 6), (0, 3)], gap_ns=2) == [(0, 6)]
    assert merge([(5, 6), (0, 3)], gap_ns=1) == [(0, 3), (5, 6)]


def test_an_axis_has_round_numbers() -> None:
    assert ticks(12_300_000, 7) == [
        *((0, "0"), (2_000_000, "2"), (4_000_000, "4"), (6_000_000, "6")),
        *((8_000_000, "8"), (10_000_000, "10"), (12_000_000, "12")),
    ]
    assert ticks(1_200_000, 4) == [(0, "0.0"), (500_000, "0.5"), (1_000_000, "1.0")]
    assert ticks(0, 7) == [(0, "0.000000")]
    assert ticks(10**18, 2) == [(0, "0"), (10**18, "1.00e+12")]


def test_figures_take_few_characters() -> None:
    times = (0, 21_000, 12_340_000, 123_400_000, 4_520_000_000, 10**18)
    assert [ms_number(time_ns) for time_ns in times] == [
        *("0.000", "0.021", "12.34", "123.4", "4,520", "1.00e+12")
    ]
    sizes = (17, 11_600, 1_234_567, 3 * 10**9, 5 * 10**12, 10**18)
    assert [bytes_text(size) for size in sizes] == [
        *("17 B", "11.6 KB", "1.2 MB", "3.0 GB", "5.0 TB", "1.0e+06 TB")
    ]
