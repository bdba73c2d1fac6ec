"""The Range header: what is asked for, whatever stands in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnode.gateway.ranges import (
    MAX_RANGES,
    NoSuchBytes,
    Parts,
    TooManyRanges,
    parse_ranges_untrusted,
)
from meshnode.models.spans import Span

SIZE = 1000


def asked(header: str) -> list[tuple[int, int]]:
    return [(span.start, span.stop) for span in parse_ranges_untrusted(header, 0, SIZE)]


@pytest.mark.parametrize(
    ("header", "stretches"),
    [
        ("bytes=0-0", [(0, 1)]),
        ("bytes=0-", [(0, 1000)]),
        ("bytes=-1", [(999, 1000)]),
        ("bytes=-5000", [(0, 1000)]),
        ("Bytes = 10-19", [(10, 20)]),
        ("bytes=990-5000", [(990, 1000)]),
        ("bytes=500-509, 0-9", [(500, 510), (0, 10)]),
        ("bytes=0-9,5-19,, 100-100", [(0, 20), (100, 101)]),
        ("bytes=0-9,5000-", [(0, 10)]),
        (f"bytes=0-{'9' * 5000}", [(0, 1000)]),
        (f"bytes={'0' * 5000}1-2", [(1, 3)]),
    ],
)
def test_what_is_asked_for(header: str, stretches: list[tuple[int, int]]) -> None:
    assert asked(header) == stretches


@pytest.mark.parametrize(
    "header",
    [
        *("", "bytes", "bytes=", "bytes=,", "bytes=-", "bytes=9-1", "bytes=a-b", "lines=1-2"),
        *("bytes=1", "bytes=0-1,x", "bytes=0x1-2", "bytes=+1-2", "bytes=--1", "bytes=１-２"),
        "bytes=1 - 2",
    ],
)
def test_what_makes_no_sense_is_as_good_as_none(header: str) -> None:
    assert asked(header) == []


@pytest.mark.parametrize(
    "header", ["bytes=1000-", "bytes=-0", f"bytes={'9' * 5000}-", "bytes=2000-3000,1000-1001"]
)
def test_what_lies_beyond_the_end_is_told(header: str) -> None:
    with pytest.raises(NoSuchBytes):
        asked(header)


def test_so_many_ranges_are_refused_without_the_work() -> None:
    most = ",".join(f"{2 * at}-{2 * at}" for at in range(MAX_RANGES))
    assert len(asked(f"bytes={most}")) == MAX_RANGES
    with pytest.raises(TooManyRanges):
        asked(f"bytes={most},999-")


@given(st.text("bytes=-,0123456789 ", max_size=60) | st.text(max_size=30), st.integers(1, 200))
def test_any_text_gives_stretches_within_the_file(header: str, size_bytes: int) -> None:
    try:
        spans = parse_ranges_untrusted(f"bytes={header}", 0, size_bytes)
    except (TooManyRanges, NoSuchBytes):
        return
    assert all(0 <= span.start < span.stop <= size_bytes for span in spans)
    assert sum(span.size_bytes for span in spans) <= size_bytes


def test_an_answer_in_parts_is_as_long_as_it_says() -> None:
    parts = Parts((Span(0, 5, 10), Span(0, 0, 2)), SIZE, "edge")
    bodies = [b"a" * 5, b"b" * 2]
    whole = (
        b"".join(head + body for head, body in zip(parts.heads(), bodies, strict=True)) + parts.tail
    )
    assert len(whole) == parts.content_bytes
    assert whole == (
        b"\r\n--edge\r\nContent-Type: application/octet-stream\r\n"
        b"Content-Range: bytes 5-9/1000\r\n\r\naaaaa"
        b"\r\n--edge\r\nContent-Type: application/octet-stream\r\n"
        b"Content-Range: bytes 0-1/1000\r\n\r\nbb\r\n--edge--\r\n"
    )
