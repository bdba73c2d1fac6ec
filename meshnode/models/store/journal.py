"""`journal`: ranges of a slice's files that are whole on the disk, in tensors that are not yet.

Records of 28 bytes are appended, each after its range was flushed: file index, start, stop, and
eight bytes of BLAKE3 over them and the slice's key. One that was cut short by a kill or damaged by
a disk counts as not written; so does the journal of other files.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from blake3 import blake3

from meshnode.models.spans import Span
from meshnode.state import write_durably

JOURNAL_NAME = "journal"
_RANGE = struct.Struct("<IQQ")
_SEAL_BYTES = 8
_RECORD_BYTES = _RANGE.size + _SEAL_BYTES
MAX_JOURNAL_BYTES = 64 * 2**20  # two million chunks
_CONTEXT = "mesh slice journal 1"


def to_record(key: bytes, span: Span) -> bytes:
    body = _RANGE.pack(span.file_index, span.start, span.stop)
    return body + _seal(key, body)


def parse_records_untrusted(key: bytes, data: bytes) -> Iterator[Span]:
    """The ranges told of, those of damaged records left out. Raises nothing."""
    for at in range(0, len(data) - _RECORD_BYTES + 1, _RECORD_BYTES):
        body = data[at : at + _RANGE.size]
        if data[at + _RANGE.size : at + _RECORD_BYTES] == _seal(key, body):
            file_index, start, stop = _RANGE.unpack(body)
            if start < stop:
                yield Span(file_index, start, stop)


def _seal(key: bytes, body: bytes) -> bytes:
    return blake3(key + body, derive_key_context=_CONTEXT).digest(_SEAL_BYTES)


class Journal:
    """I append to one slice's journal, which its writer alone does."""

    def __init__(self, folder: Path, key: bytes) -> None:
        self._path = folder / JOURNAL_NAME
        self._key = key
        self._fd = -1

    def read(self) -> list[Span]:
        """What it tells of; nothing where it cannot be read. `OSError` never."""
        try:
            with self._path.open("rb") as file:
                return list(parse_records_untrusted(self._key, file.read(MAX_JOURNAL_BYTES)))
        except OSError:
            return []

    def rewrite(self, spans: Iterable[Span]) -> None:
        """Replaces it, durably. Raises what `write_durably` does; the old one stands then."""
        self.close()
        write_durably(self._path, b"".join(to_record(self._key, span) for span in spans))

    def append(self, span: Span) -> None:
        """Adds a range that has been flushed, and returns once that is durable. Raises `OSError`;
        what was half written counts as not written."""
        if self._fd < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o600)
        # A record cut short by a full disk must not push the next ones off their places.
        at = os.lseek(self._fd, 0, os.SEEK_END)
        at -= at % _RECORD_BYTES
        record = to_record(self._key, span)
        if os.pwrite(self._fd, record, at) < len(record):
            os.pwrite(self._fd, record, at)  # once more: raises what stood in the way
        os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
