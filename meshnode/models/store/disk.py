"""What the store asks of a file system: holes, room, and room given back."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meshnode.config import human_bytes
from meshnode.errors import DiskFull, ModelError, ResourceError

MARGIN_BYTES = 256 * 2**20
"""Left free beside what is to be written: a disk filled to the brim stops everything else too.
Of a small one it is a twentieth."""
_PROBE_BYTES = 16 * 2**20
_BLOCK_BYTES = 512  # what st_blocks counts, whatever the file system's own are
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h


class NoHoles(ResourceError):
    """The file system writes zeros where nothing was written."""


class NoRoom(ResourceError):
    """Too little space for what is to be written; nothing was."""


class WriteRefused(ModelError):
    """The system does not let the store write."""


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Turns the system's refusals to write into sentences."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"no space left to write {path}: what was pulled so far stays; free some (`mesh "
                "models gc --keep SIZE`) and start again"
            ) from error
        raise WriteRefused(
            f"{path} cannot be written: {error.strerror}; check its owner and its disk"
        ) from error


def check_holes(folder: Path) -> None:
    """Raises `NoHoles` where a file's unwritten part takes up space, as on FAT."""
    probe = folder / f".holes.{secrets.token_hex(4)}"
    with told(folder):
        fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, _PROBE_BYTES)
            os.pwrite(fd, b"x", _PROBE_BYTES - 1)
            os.fsync(fd)
            has_holes = os.fstat(fd).st_blocks * _BLOCK_BYTES < _PROBE_BYTES // 2
        finally:
            os.close(fd)
            probe.unlink(missing_ok=True)
    if not has_holes:
        raise NoHoles(
            f"the file system of {folder} has no holes in files (FAT and exFAT have none), so a "
            "part of a model would take the room of the whole: choose another with --home"
        )


def check_room(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises `NoRoom` where less than `needed_bytes` and a margin are free."""
    free_bytes, total_bytes = _space(folder)
    margin_bytes = min(MARGIN_BYTES, total_bytes // 20)
    if needed_bytes and free_bytes < needed_bytes + margin_bytes:
        raise NoRoom(
            f"{what} needs {human_bytes(needed_bytes)} more in {folder}, and "
            f"{human_bytes(free_bytes)} are free there, of which {human_bytes(margin_bytes)} are "
            "to stay free: free some (`mesh models gc --keep SIZE`) or name another disk with "
            "--home"
        )


def _space(folder: Path) -> tuple[int, int]:
    """Bytes that are free to us, and all that the disk has."""
    with told(folder):
        found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def allocated_bytes(folder: Path) -> int:
    """What the folder's files take up on the disk, holes not counted. What is gone takes up
    nothing."""
    total = 0
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                total += path.lstat().st_blocks * _BLOCK_BYTES
    return total


def punch_hole(fd: int, start: int, stop: int) -> bool:
    """Gives back what these bytes take up; they read as zeros then. False where the system or the
    file system has no such call: nothing is changed then."""
    if start >= stop or _fallocate is None:
        return start >= stop
    ctypes.set_errno(0)
    mode = _PUNCH_HOLE | _KEEP_SIZE
    return _fallocate(fd, mode, start, stop - start) == 0


def can_punch(folder: Path) -> bool:
    """Whether room is given back within a file of this folder."""
    probe = folder / f".punch.{secrets.token_hex(4)}.part"
    with told(folder):
        fd = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            return punch_hole(fd, 0, _PROBE_BYTES)
        finally:
            os.close(fd)
            probe.unlink(missing_ok=True)


class Reserve:
    """Room kept so that a disk that runs full midway still takes word of what was done."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        """Kept as far as the system can; swept away with other `.part` files after a kill."""
        self._path = folder / f".reserve.{secrets.token_hex(4)}.part"
        with suppress(OSError):
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size_bytes)
            finally:
                os.close(fd)

    def release(self) -> bool:
        """Gives it back; whether there was any."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True


def data_in(fd: int, start: int, stop: int) -> bool:
    """Whether any of these bytes take up space, as far as the system can tell."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA) < stop
    except OSError:
        return False


def _find_fallocate() -> Callable[[int, int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if call is None:
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    call.restype = ctypes.c_int
    found: Callable[[int, int, int, int], int] = call
    return found


_fallocate = _find_fallocate()
