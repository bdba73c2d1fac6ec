"""Who works on a slice. Both locks are the kernel's (flock): they go with the process.

`lock`: one writer. `used`: shared by all who read or write, alone for who removes or punches holes;
its time of change is when the slice was last used.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meshnode.errors import ModelError
from meshnode.models.slice_mark import SLICE_DOCUMENT

WRITER_LOCK = "lock"
USE_LOCK = "used"


class SliceInUse(ModelError):
    """Another process writes to the slice, or reads it."""


class SliceGone(ModelError):
    """The slice was removed meanwhile."""


class Lock:
    """One of the two, held until closed."""

    def __init__(self, folder: Path, name: str, *, shared: bool = False) -> None:
        """Raises `SliceInUse`, `SliceGone`, or `OSError` where the folder cannot be written."""
        self._path = folder / name
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise SliceGone(f"{folder} was removed meanwhile: pull it again") from None
        try:
            self._take(shared)
            found = os.fstat(self._fd)
            try:
                there = os.stat(self._path)
            except FileNotFoundError:
                raise SliceGone(f"{folder} was removed meanwhile: pull it again") from None
            if (there.st_dev, there.st_ino) != (found.st_dev, found.st_ino):
                raise SliceGone(f"{folder} was replaced meanwhile: try again")
        except BaseException:
            self.close()
            raise

    def _take(self, shared: bool) -> None:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            folder = self._path.parent
            doing = "written to" if self._path.name == WRITER_LOCK else "used"
            raise SliceInUse(
                f"{folder} is being {doing} by another process: try again when that is done"
            ) from None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else shares it meanwhile. Raises `SliceInUse`; it is shared again then."""
        try:
            self._take(shared=False)
        except SliceInUse:
            self._take(shared=True)
            raise
        try:
            yield
        finally:
            self._take(shared=True)

    def touch(self) -> None:
        """Now is when the slice was last used."""
        os.utime(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def last_used_ns(folder: Path) -> int:
    """When the slice was last used, as far as that is known."""
    for name in (USE_LOCK, SLICE_DOCUMENT):
        try:
            return (folder / name).stat().st_mtime_ns
        except OSError:
            continue
    return 0
