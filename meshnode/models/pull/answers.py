"""I judge the heads of HTTP answers to range requests (RFC 9110, section 14): what is in the body,
or why it is not to be used.

A body is used only where its head says exactly the bytes that were asked, of a file that is as long
as it was and has the same validators. `X-Linked-ETag` and `X-Linked-Size` are Hugging Face's: what
it says of a file before it sends us on to where that lies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from meshnode.models.pull.source import (
    NotForEverybody,
    SourceChanged,
    SourceError,
    SourceFault,
)

REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,19})")
_NUMBER = re.compile(r"\d{1,19}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]*"')
_DATE = re.compile(r"[\x20-\x7e]{1,64}")


@dataclass(frozen=True)
class Head:
    """Status and headers of one answer; names in lower case."""

    status: int
    headers: tuple[tuple[str, str], ...]

    def get(self, name: str) -> str | None:
        """Its value where it stands there once."""
        values = {value.strip() for key, value in self.headers if key == name}
        return values.pop() if len(values) == 1 else None

    def number(self, name: str) -> int | None:
        value = self.get(name)
        return int(value) if value is not None and _NUMBER.fullmatch(value) else None


@dataclass(frozen=True)
class Marks:
    """By what a server tells one state of a file from another."""

    etag: str | None = None
    modified: str | None = None
    sha256: str | None = None

    @property
    def condition(self) -> str | None:
        """For `If-Range`: what holds only for the very same bytes."""
        return self.etag or self.modified

    def validator(self, size_bytes: int) -> str:
        if self.sha256 is not None:
            return f"sha256:{self.sha256}"
        if self.etag is not None:
            return f"etag:{self.etag}"
        if self.modified is not None:
            return f"modified:{self.modified} {size_bytes}"
        return f"length:{size_bytes}"


@dataclass(frozen=True)
class Described:
    """A file as the answer to a request for its first byte describes it."""

    size_bytes: int
    marks: Marks
    has_ranges: bool


@dataclass(frozen=True)
class Asked:
    """What a request asked for. `shown` is the address for messages."""

    shown: str
    start: int
    stop: int
    file: Described = field(repr=False)


def marks_of(heads: Iterable[Head]) -> Marks:
    """From the answers on the way to a file, redirects first, the file's own last."""
    marks, sha256 = Marks(), None
    for head in heads:
        etag = head.get("etag")
        strong = etag if etag is not None and _STRONG_ETAG.fullmatch(etag) else None
        linked = (head.get("x-linked-etag") or "").removeprefix("W/").strip('"')
        if _SHA256.fullmatch(linked):
            sha256 = linked
        modified = head.get("last-modified") or ""
        marks = Marks(strong, modified if _DATE.fullmatch(modified) else None)
    return Marks(marks.etag, marks.modified, sha256)


def describe(heads: Sequence[Head], shown: str) -> Described:
    """The answers to a request for the first byte: redirects, then the file's own. Raises
    `SourceError`, `SourceFault`."""
    head, marks = heads[-1], marks_of(heads)
    if head.status not in (200, 206):
        raise refusal(head, shown)
    _no_coding(head, shown)
    if head.status == 206:
        start, stop, total = _content_range(head, shown)
        if (start, stop) != (0, 1) or total is None:
            raise SourceError(f"{shown} does not say how long it is: take it from elsewhere")
        return Described(total, marks, has_ranges=True)
    size_bytes = head.number("content-length")
    if not size_bytes:
        raise SourceError(f"{shown} is empty, or does not say how long it is")
    return Described(size_bytes, marks, has_ranges=False)


def check(head: Head, asked: Asked) -> int:
    """How many bytes of the body to pass over before those that were asked for. Raises
    `SourceChanged`, `SourceError`, `SourceFault`."""
    if head.status == 412:
        raise changed(asked.shown)
    if head.status == 416:
        unsatisfied = _UNSATISFIED.fullmatch(head.get("content-range") or "")
        if unsatisfied and int(unsatisfied[1]) != asked.file.size_bytes:
            raise changed(asked.shown)
        raise SourceError(f"{asked.shown} has no bytes where it said it had some")
    if head.status not in (200, 206):
        raise refusal(head, asked.shown)
    _no_coding(head, asked.shown)
    _same_marks(head, asked)
    body_bytes = head.number("content-length")
    if head.status == 200:
        if body_bytes is not None and body_bytes != asked.file.size_bytes:
            raise changed(asked.shown)
        if asked.file.has_ranges:
            raise SourceFault(f"{asked.shown} was sent whole where a part was asked for")
        return asked.start
    start, stop, total = _content_range(head, asked.shown)
    if total is not None and total != asked.file.size_bytes:
        raise changed(asked.shown)
    if (start, stop) != (asked.start, asked.stop) or body_bytes not in (None, stop - start):
        raise SourceError(
            f"{asked.shown} sends other bytes than were asked for: its server, or a cache on the "
            "way, is broken; take it from elsewhere"
        )
    return 0


def refusal(head: Head, shown: str) -> SourceError | SourceFault:
    """The error for an answer that is none of those hoped for."""
    if head.status in _BUSY:
        pause_s = min(head.number("retry-after") or 0, 3600)
        return SourceFault(f"{shown} is not to be had at the moment ({head.status})", pause_s)
    if head.get("x-error-code") == "GatedRepo":
        return NotForEverybody(
            f"{shown} is gated: ask for access on its page, then log in with `hf auth login` or "
            "set HF_TOKEN",
            shown,
        )
    if head.status in (401, 403):
        return NotForEverybody(
            f"{shown} is not for everybody ({head.status}): give a token or a password, or check "
            "the name",
            shown,
        )
    if head.status in (404, 410):
        return SourceError(f"there is no {shown} ({head.status}): check the name")
    return SourceError(f"{shown} was answered with {head.status}, which is of no use here")


def changed(shown: str) -> SourceChanged:
    return SourceChanged(
        f"{shown} is another file than it was: what came so far is not used with it; pull again"
    )


def _same_marks(head: Head, asked: Asked) -> None:
    marks, now = asked.file.marks, marks_of((head,))
    if marks.etag is not None and now.etag is not None:
        if marks.etag != now.etag:
            raise changed(asked.shown)
    elif marks.modified is not None and now.modified not in (None, marks.modified):
        raise changed(asked.shown)


def _no_coding(head: Head, shown: str) -> None:
    if any(key == "content-encoding" and value != "identity" for key, value in head.headers):
        raise SourceError(f"{shown} comes compressed, though it was asked for as it is")


def _content_range(head: Head, shown: str) -> tuple[int, int, int | None]:
    """Start, stop, length of the file where it is told."""
    found = _CONTENT_RANGE.fullmatch(head.get("content-range") or "")
    if found is None:
        raise SourceError(f"{shown} does not say which part of it was sent")
    return int(found[1]), int(found[2]) + 1, None if found[3] == "*" else int(found[3])
