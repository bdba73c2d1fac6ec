"""The Range header of a request, and the frame of an answer in several parts. Sans-IO.

RFC 9110, 14.2: a header that makes no sense, or is in another unit than bytes, is as good as none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from meshnode.models.spans import Span, joined, size_of

MAX_RANGES = 64
_MAX_DIGITS = 19
_SET = re.compile(r"bytes[ \t]*=(.*)", re.IGNORECASE)
_RANGE = re.compile(r"([0-9]*)-([0-9]*)")


class TooManyRanges(Exception):
    """More than MAX_RANGES of them."""


class NoSuchBytes(Exception):
    """None of the ranges has a byte of the file."""


def parse_ranges_untrusted(header: str, file_index: int, size_bytes: int) -> tuple[Span, ...]:
    """The stretches of a file of that size that are asked for; empty where all of it is.

    They are in the order asked for, or, where some overlap, joined. Raises `TooManyRanges`,
    `NoSuchBytes` and nothing else.
    """
    found = _SET.fullmatch(header.strip())
    texts = [part.strip() for part in found[1].split(",")] if found else []
    texts = [text for text in texts if text]
    ranges = [_RANGE.fullmatch(text) for text in texts[: MAX_RANGES + 1]]
    bounds = [_bounds(one[1], one[2], size_bytes) for one in ranges if one is not None]
    if not bounds or None in ranges or None in bounds:
        return ()
    if len(bounds) > MAX_RANGES:
        raise TooManyRanges
    spans = [
        Span(file_index, one[0], one[1]) for one in bounds if one is not None and one[0] < one[1]
    ]
    if not spans:
        raise NoSuchBytes
    union = joined(spans)
    return tuple(spans) if size_of(spans) == size_of(union) else union


def _bounds(first: str, last: str, size_bytes: int) -> tuple[int, int] | None:
    """Start and stop within the file, which may be nothing; None for no range."""
    if not first:
        return (max(0, size_bytes - _number(last)), size_bytes) if last else None
    start = _number(first)
    if not last:
        return start, size_bytes
    if _number(last) < start:
        return None
    return start, min(_number(last) + 1, size_bytes)


def _number(digits: str) -> int:
    """Of any length, without the work that a very long one would be."""
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) <= _MAX_DIGITS else 10**_MAX_DIGITS


def content_range(span: Span, size_bytes: int) -> str:
    return f"bytes {span.start}-{span.stop - 1}/{size_bytes}"


@dataclass(frozen=True)
class Parts:
    """The body of a `multipart/byteranges` answer (RFC 9110, 14.6)."""

    spans: tuple[Span, ...]
    size_bytes: int
    boundary: str

    @property
    def content_type(self) -> str:
        return f"multipart/byteranges; boundary={self.boundary}"

    @property
    def content_bytes(self) -> int:
        """How long the body is."""
        return size_of(self.spans) + sum(map(len, self.heads())) + len(self.tail)

    def heads(self) -> Sequence[bytes]:
        """What comes before the bytes of each span."""
        return [
            (
                f"\r\n--{self.boundary}\r\nContent-Type: application/octet-stream\r\n"
                f"Content-Range: {content_range(span, self.size_bytes)}\r\n\r\n"
            ).encode()
            for span in self.spans
        ]

    @property
    def tail(self) -> bytes:
        """What comes after the last."""
        return f"\r\n--{self.boundary}--\r\n".encode()
