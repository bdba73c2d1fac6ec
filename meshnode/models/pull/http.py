"""Byte ranges of files on the web (RFC 9110, section 14), as a `RangeSource`.

A file is asked for at the address that was named. Where that sends us on, as a hub does to where
its files lie, the last address is kept and asked from then on, until it refuses: such addresses are
good for an hour or so, and then the first is asked again. Each answer is held against what the
first one said: same validators, same length, exactly the bytes that were asked for (`answers.py`).

A server that ignores Range gives a file only from its beginning: then the source `is_sequential`,
and what lies before a part is received and dropped.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

import trio

from meshnode.models.pull import answers
from meshnode.models.pull.answers import Asked, Described, Head
from meshnode.models.pull.client import PLAIN, Client, Named, patiently
from meshnode.models.pull.exchange import Exchange
from meshnode.models.pull.reach import Reach
from meshnode.models.pull.source import SourceError, SourceFault, SourceFile, joint_validator
from meshnode.models.pull.url import Url
from meshnode.models.spans import Span

FIRST_BYTE = {"Range": "bytes=0-0"}
_STALE = (400, 401, 403, 404, 410, *answers.REDIRECTS)


@dataclass(frozen=True)
class WebFile:
    """A file to open. `sha256` (hex) and `size_bytes` are what its reference says of it, where it
    says so."""

    named: Named
    name: str
    sha256: str | None = None
    size_bytes: int | None = None


@dataclass(frozen=True)
class _Place:
    """Where a file was found to lie, and what was said of it."""

    url: Url
    described: Described
    is_elsewhere: bool


class HttpSource:
    """I read files from web servers. Made by `open_http`."""

    def __init__(self, client: Client, files: Sequence[WebFile], places: Sequence[_Place]) -> None:
        self._client = client
        self._web_files = tuple(files)
        self._first = tuple(place.described for place in places)
        self._places: list[_Place | None] = list(places)
        self._finding = trio.Lock()
        self.title = files[0].named.url.origin.host
        self.holds: tuple[Span, ...] | None = None
        self.rtt_s: float | None = None
        self.is_sequential = not all(first.has_ranges for first in self._first)
        self.files = tuple(
            SourceFile(file.name, first.size_bytes, first.marks.validator(first.size_bytes))
            for file, first in zip(files, self._first, strict=True)
        )

    @property
    def validator(self) -> str:
        return joint_validator(self.files)

    async def read(
        self, file_index: int, start: int, stop: int, into: Callable[[memoryview], None]
    ) -> None:
        """See `RangeSource`."""
        named = self._web_files[file_index].named
        place = await self._place(file_index)
        headers = {**PLAIN, "Range": f"bytes={start}-{stop - 1}"}
        headers |= named.secrets_for(place.url.origin)
        if condition := place.described.marks.condition:
            headers["If-Range"] = condition
        asked = Asked(named.url.shown, start, stop, place.described)

        def work(exchange: Exchange) -> int | None:
            head = exchange.ask(place.url, headers)
            if head.status in _STALE and place.is_elsewhere:
                return head.status
            skip_bytes = answers.check(head, asked)
            exchange.receive(place.url, skip_bytes, stop - start, into)
            return None

        stale = await self._client.exchange(named, place.url, work)
        if stale is not None:
            if self._places[file_index] is place:
                self._places[file_index] = None
            raise SourceFault(f"{named.url.shown} lies no longer where it was found ({stale})")

    async def _place(self, file_index: int) -> _Place:
        async with self._finding:
            place = self._places[file_index]
            if place is None:
                file, first = self._web_files[file_index], self._first[file_index]
                place = await _find(self._client, file)
                if not _is_same(place.described, first):
                    raise answers.changed(file.named.url.shown)
                described = replace(place.described, has_ranges=first.has_ranges)
                place = replace(place, described=described)
                self._places[file_index] = place
            return place


@asynccontextmanager
async def open_http(files: Sequence[WebFile], reach: Reach) -> AsyncIterator[HttpSource]:
    """Asks after each file first. Raises `SourceError`; `SourceFault` after a few tries."""
    client = Client(reach)
    try:
        places = [await patiently(partial(_find, client, file)) for file in files]
        yield HttpSource(client, files, places)
    finally:
        client.close()


async def _find(client: Client, file: WebFile) -> _Place:
    shown = file.named.url.shown

    def receive(exchange: Exchange, url: Url, heads: Sequence[Head]) -> _Place:
        described = answers.describe(heads, shown)
        if file.size_bytes not in (None, described.size_bytes):
            raise SourceError(
                f"{shown} has {described.size_bytes} bytes where {file.size_bytes} were announced: "
                "not used"
            )
        if described.has_ranges:
            exchange.receive(url, 0, 1, lambda _: None)
        if file.sha256 is not None:
            marks = replace(described.marks, sha256=file.sha256)
            described = replace(described, marks=marks)
        return _Place(url, described, is_elsewhere=len(heads) > 1)

    return await client.follow(file.named, FIRST_BYTE, receive)


def _is_same(now: Described, first: Described) -> bool:
    if now.size_bytes != first.size_bytes:
        return False
    if first.marks.sha256 is not None and now.marks.sha256 is not None:
        return now.marks.sha256 == first.marks.sha256
    return now.marks == first.marks
