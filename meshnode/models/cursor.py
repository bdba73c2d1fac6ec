"""Numbers and strings of a GGUF file one after another, without trusting a byte and without keeping
what was passed: a window of 1 MiB, wherever the bytes come from.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from meshnode.errors import ModelError

MAX_HEADER_BYTES = 256 * 1024 * 1024
WINDOW_BYTES = 1 << 20
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")

Number = int | float | bool


class NotGguf(ModelError):
    """The file is something else, or a GGUF this mesh cannot read."""


class TruncatedGguf(ModelError):
    """The file ends before what its header announces."""


class DamagedGguf(ModelError):
    """The header contradicts itself or announces what cannot be."""


class HeaderIncomplete(ModelError):
    """The bytes in hand end inside the header; it takes the file's first `at_least_bytes` to read
    on, and perhaps more after that."""

    def __init__(self, path: Path, at_least_bytes: int) -> None:
        super().__init__(
            f"the header of {path} goes on to byte {at_least_bytes} at least: fetch more of it"
        )
        self.at_least_bytes = at_least_bytes


class Bytes(Protocol):
    """A file's bytes, or the first of them."""

    def read(self, start: int, least: int, most: int) -> bytes | memoryview:
        """From `start` to somewhere between `least` and `most`, none beyond the file's end."""


class FileBytes:
    """An open file."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    def read(self, start: int, least: int, most: int) -> bytes:
        found = os.pread(self._fd, most - start, start)
        while len(found) < least - start:
            more = os.pread(self._fd, most - start - len(found), start + len(found))
            if not more:
                raise TruncatedGguf(f"{self._path} shrank while it was read: try again")
            found += more
        return found


class PrefixBytes:
    """A file's first bytes in memory."""

    def __init__(self, path: Path, data: bytes | bytearray | memoryview) -> None:
        self._path = path
        self._data = memoryview(data).toreadonly()

    def read(self, start: int, least: int, most: int) -> memoryview:
        if least > len(self._data):
            raise HeaderIncomplete(self._path, least)
        return self._data[start:most]


class Cursor:
    """I walk over a header. Every method raises `TruncatedGguf` where the file ends before what is
    asked for, `DamagedGguf` beyond `MAX_HEADER_BYTES`."""

    def __init__(self, path: Path, size_bytes: int, source: Bytes) -> None:
        self.at = 0
        self._path = path
        self._size_bytes = size_bytes
        self._source = source
        self._window: bytes | memoryview = b""
        self._window_start = 0

    def number(self, kind: struct.Struct) -> int:
        number: int = self.scalar(kind)
        return number

    def scalar(self, kind: struct.Struct):  # type: ignore[no-untyped-def]
        place = self._hold(kind.size)
        self.at += kind.size
        return kind.unpack_from(self._window, place)[0]

    def take(self, count: int) -> bytes:
        """`count` is the caller's to bound."""
        place = self._hold(count)
        self.at += count
        return bytes(self._window[place : place + count])

    def skip(self, count: int) -> None:
        self._check(self.at + count)
        self.at += count

    def skip_strings(self, count: int) -> None:
        """`count` times a u64 length and as many bytes: a loop of its own, as a vocabulary and its
        merges are most of a header."""
        length = U64.unpack_from
        while count:
            at = self._hold(U64.size)
            window = self._window
            last = len(window) - U64.size
            while count and at <= last:
                at += U64.size + length(window, at)[0]
                count -= 1
            self.at = self._window_start + at
            self._check(self.at)

    def digest_into(self, digest: blake3, start: int, stop: int) -> None:
        """Bytes that the walk has passed, read again."""
        while start < stop:
            end = min(stop, start + WINDOW_BYTES)
            digest.update(self._source.read(start, end, end))
            start = end

    def _hold(self, count: int) -> int:
        """The place in the window of the next `count` bytes, which are in it now."""
        place = self.at - self._window_start
        if place + count > len(self._window):
            self._check(self.at + count)
            most = min(self._size_bytes, self.at + max(count, WINDOW_BYTES))
            self._window = self._source.read(self.at, self.at + count, most)
            self._window_start = self.at
            return 0
        return place

    def _check(self, end: int) -> None:
        if end > self._size_bytes:
            raise TruncatedGguf(
                f"{self._path} is truncated or damaged: its header goes on past its last byte; "
                "copy or download it again"
            )
        if end > MAX_HEADER_BYTES:
            raise DamagedGguf(
                f"{self._path} is damaged, its header is larger than any model's: copy or download "
                "the file again"
            )
