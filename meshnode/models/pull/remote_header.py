"""Headers of files at a source: fetched in steps until they are whole, and no more than that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import trio

from meshnode.models.cursor import HeaderIncomplete, NotGguf
from meshnode.models.header import Header, parse_header
from meshnode.models.header_bounds import (
    MAX_FETCHED_HEADER_BYTES,
    USUAL_HEADER_BYTES,
    HeaderBounds,
    HeadersTooLarge,
    too_large,
)
from meshnode.models.pull.client import patiently
from meshnode.models.pull.source import RangeSource

FIRST_STEP_BYTES = 1 << 20
GROWTH = 4


@dataclass(frozen=True)
class RemoteHeader:
    """`data` is the file up to where its weights begin."""

    header: Header
    data: bytes


async def fetch_headers(
    source: RangeSource, large: trio.CapacityLimiter | None = None
) -> list[RemoteHeader]:
    """Of all files, together no larger than a model's may be. large: of headers that are larger
    than usual only so many are in memory at once. Raises as `fetch_header` does."""
    if large is None:
        return await _fetch_headers(source, MAX_FETCHED_HEADER_BYTES)
    try:
        return await _fetch_headers(source, USUAL_HEADER_BYTES)
    except HeadersTooLarge:
        pass
    async with large:
        return await _fetch_headers(source, MAX_FETCHED_HEADER_BYTES)


async def _fetch_headers(source: RangeSource, limit_bytes: int) -> list[RemoteHeader]:
    bounds = HeaderBounds(limit_bytes)
    found = []
    for index in range(len(source.files)):
        fetched = await fetch_header(source, index, bounds.left_bytes)
        found.append(replace(fetched, header=bounds.admit(fetched.header)))
    return found


async def fetch_header(
    source: RangeSource, file_index: int, limit_bytes: int = MAX_FETCHED_HEADER_BYTES
) -> RemoteHeader:
    """Raises what `parse_header` does, of the file by its name, `DamagedGguf` where it takes more
    bytes than `limit_bytes`, and what a read does after a few tries."""
    file = source.files[file_index]
    path = Path(file.name)
    data = bytearray()
    wanted_bytes = FIRST_STEP_BYTES
    there_bytes = min(_held_bytes(source, file_index), file.size_bytes)
    most_bytes = min(there_bytes, limit_bytes)
    while True:
        stop = min(wanted_bytes, most_bytes)
        await _fetch_up_to(stop, source, file_index, data)
        try:
            header = await trio.to_thread.run_sync(parse_header, bytes(data), file.size_bytes, path)
        except HeaderIncomplete as incomplete:
            if stop == there_bytes:
                raise
            if stop == most_bytes:
                raise too_large(path) from None
            wanted_bytes = max(incomplete.at_least_bytes, GROWTH * len(data))
            continue
        except NotGguf:
            if data.startswith(b"GGUF"):
                raise
            raise NotGguf(
                f"what {source.title} gives as {file.name} is no GGUF file, but a page perhaps: "
                "look at the address in a browser, and check it"
            ) from None
        if min(header.data_start, file.size_bytes) > limit_bytes:
            raise too_large(path)
        await _fetch_up_to(min(header.data_start, file.size_bytes), source, file_index, data)
        return RemoteHeader(header, bytes(memoryview(data)[: header.data_start]))


def _held_bytes(source: RangeSource, file_index: int) -> int:
    """How far the source has the file from its beginning on."""
    if source.holds is None:
        return source.files[file_index].size_bytes
    firsts = (span for span in source.holds if span.file_index == file_index and not span.start)
    return max((span.stop for span in firsts), default=0)


async def _fetch_up_to(stop: int, source: RangeSource, file_index: int, data: bytearray) -> None:
    async def fetch() -> None:
        if len(data) < stop:
            await source.read(file_index, len(data), stop, data.extend)

    await patiently(fetch)
