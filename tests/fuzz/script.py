"""What the parsers' harnesses share: bytes read as a script of steps, and files in memory."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path


class Script:
    """I read choices and numbers from an input; beyond its end all are 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def over(self) -> bool:
        return self._at >= len(self._data)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def number(self) -> int:
        """Small, of two bytes, or any of eight."""
        kind = self.byte()
        width = 8 if kind > 250 else 2 if kind > 200 else 0
        if not width:
            return kind
        self._at += width
        return int.from_bytes(self._data[self._at - width : self._at], "big")

    def bytes(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at].ljust(count, b"\0")


def scratch_file(name: str, data: bytes) -> Path:
    """A file with these bytes, replaced by the next."""
    path = scratch_folder() / name
    path.write_bytes(data)
    return path


def scratch_folder() -> Path:
    return Path(_scratch().name)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """In memory where there is such a place; it goes with the process."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(
        prefix="mesh-fuzz-", dir=memory if memory.is_dir() else None, ignore_cleanup_errors=True
    )
