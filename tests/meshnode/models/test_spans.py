"""Sets of byte spans against the same sets written out byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.models.spans import Span, joined, size_of, within, without

SPANS = st.lists(
    st.builds(
        lambda file, start, size: Span(file, start, start + size),
        st.integers(0, 2),
        st.integers(0, 40),
        st.integers(1, 12),
    ),
    max_size=8,
)


def bytes_of(spans: tuple[Span, ...] | list[Span]) -> set[tuple[int, int]]:
    return {(span.file_index, at) for span in spans for at in range(span.start, span.stop)}


def is_tidy(spans: tuple[Span, ...]) -> bool:
    return spans == joined(spans)


@given(SPANS, SPANS)
def test_sets_of_spans_are_sets_of_bytes(ones: list[Span], others: list[Span]) -> None:
    union, common, left = joined(ones + others), within(ones, others), without(ones, others)
    assert bytes_of(union) == bytes_of(ones) | bytes_of(others)
    assert bytes_of(common) == bytes_of(ones) & bytes_of(others)
    assert bytes_of(left) == bytes_of(ones) - bytes_of(others)
    assert is_tidy(union)
    assert is_tidy(common)
    assert is_tidy(left)
    assert size_of(union) == len(bytes_of(union))


def test_neighbours_are_joined_over_a_gap_that_is_small_enough() -> None:
    spans = [Span(0, 20, 30), Span(0, 0, 10), Span(1, 10, 20)]
    assert joined(spans, 10) == (Span(0, 0, 30), Span(1, 10, 20))
    assert joined(spans, 9) == (Span(0, 0, 10), Span(0, 20, 30), Span(1, 10, 20))


@pytest.mark.parametrize(("file", "start", "stop"), [(-1, 0, 1), (0, -1, 1), (0, 1, 1), (0, 2, 1)])
def test_a_span_that_is_none_cannot_be_made(file: int, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="no stretch"):
        Span(file, start, stop)
