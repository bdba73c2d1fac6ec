"""MESH_HOME: what survives a restart, owned by one node at a time.

Every file is replaced whole: written beside its place, flushed to the disk, renamed over the old
one, and the folder flushed, so that `kill -9` or a power cut leaves the old content or the new,
never a mixture. What cannot be read is reported and left where it is; nothing here starts afresh
over a damaged file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import platformdirs

from meshnode.crash_points import reached
from meshnode.errors import DiskFull, HomeError
from tunnels.errors import IdentityError
from tunnels.identity import Identity

PORT_DOCUMENT = "port.json"
"""The port that peers know this node at, where none was asked for."""
_LOCK_NAME = "lock"
_PART_SUFFIX = ".part"
_NODE_KEY = "node.key"
_MARKS = (_LOCK_NAME, _NODE_KEY, "root.key", "membership.json")
"""Files that tell a home of ours, also one brought back from a backup."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the last: a limit on file size (ulimit)


class HomeInUse(HomeError):
    """Another node runs on this home."""


class HomeUnusable(HomeError):
    """The home is not a folder of ours that can be written."""


class DamagedFile(HomeError):
    """A file of ours that cannot be read back; it is left as it is."""


def default_home() -> Path:
    """MESH_HOME, or the platform's place for a user's data."""
    given = os.environ.get("MESH_HOME")
    return Path(given) if given else Path(platformdirs.user_data_dir("mesh", appauthor=False))


class Home:
    """One MESH_HOME folder (0700), locked while I am open.

    The lock is the kernel's (flock): it goes with the process, however that ends.
    """

    def __init__(self, folder: Path) -> None:
        """Makes and locks the folder. Raises `HomeInUse`, `HomeUnusable` or `DiskFull`.

        A folder that is in use for other things (`--home /tmp`) is refused and left as it is.
        """
        self.folder = folder.absolute()
        _found(self.folder)
        self._lock_fd = _lock(self.folder)
        with _told(self.folder):
            self._sweep()

    def __enter__(self) -> Home:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the home back; harmless when done twice."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def subfolder(self, name: str) -> Path:
        """A folder of this name below the home, made if absent."""
        folder = self.folder / name
        with _told(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def read_bytes(self, name: str) -> bytes | None:
        """The file's content, or None where there is no such file."""
        path = self.folder / name
        try:
            return read_file(path)
        except FileNotFoundError:
            if not path.is_symlink():
                return None
            # To a disk that is not there now: what it holds still counts.
            raise HomeUnusable(f"{path} is a link to nothing: bring back what it names") from None
        except OSError as error:
            raise HomeUnusable(f"{path} cannot be read: {error.strerror}") from error

    def write_bytes(self, name: str, data: bytes) -> None:
        """Replaces the file, readable by its owner alone, and returns once that is durable."""
        write_durably(self.folder / name, data)

    def load_json(self, name: str) -> dict[str, Any] | None:
        """The document `save_json` wrote, or None where there is none. Raises `DamagedFile`."""
        data = self.read_bytes(name)
        if data is None:
            return None
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self.damaged(name) from error
        if not isinstance(document, dict):
            raise self.damaged(name)
        return document

    def save_json(self, name: str, document: dict[str, Any]) -> None:
        """Replaces the document, durably."""
        text = json.dumps(document, indent=1, sort_keys=True, allow_nan=False)
        self.write_bytes(name, text.encode() + b"\n")

    def damaged(self, name: str) -> DamagedFile:
        """The error for a file of this name whose content makes no sense to its reader."""
        path = self.folder / name
        return DamagedFile(
            f"{path} is damaged: put a copy of it back, or move it away to start without what "
            "it held"
        )

    def identity(self, name: str) -> Identity:
        """The key kept in the file of this name, made if absent. Raises `HomeError`: damaged,
        unreadable; `DiskFull`."""
        path = self.folder / name
        with _told(path):
            if path.exists() and not path.is_file():
                raise HomeUnusable(f"{path} is no file: put a copy of it back, or move it away")
        try:
            return Identity.load_or_create(path)
        except IdentityError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in _FULL:
                raise DiskFull(f"{error}: free some space and try again") from error
            raise HomeUnusable(str(error)) from error

    def _sweep(self) -> None:
        """Removes what a write cut short has left behind; the lock is ours, so nobody writes."""
        for left in self.folder.glob(f".*{_PART_SUFFIX}"):
            left.unlink(missing_ok=True)


def home_beside_node(home: Path) -> Path:
    """A home that a node may run on, or has never run on: it is made where it is missing. For what
    has a lock of its own, or needs none. Raises `HomeUnusable` or `DiskFull`."""
    home = home.absolute()
    _found(home)
    with _told(home):
        os.close(os.open(home / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    return home


def subfolder_beside_node(home: Path, name: str) -> Path:
    """A folder of this name below such a home, made where it is missing."""
    folder = home_beside_node(home) / name
    with _told(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _found(folder: Path) -> None:
    """Makes a folder fit to be a home, or finds that it is one. Raises `HomeUnusable`."""
    with _told(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.iterdir()) and not any((folder / name).exists() for name in _MARKS):
            raise HomeUnusable(
                f"{folder} holds other things: name an empty or a new folder with --home"
            )
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o700)


def is_home(folder: Path) -> bool:
    """Whether a node has lived in this folder. Raises `HomeUnusable` where we may not look."""
    with _told(folder):
        try:
            (folder / _NODE_KEY).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def read_file(path: Path) -> bytes:
    """The file's content. Raises `OSError`, also for what is no file: a pipe to which nobody writes
    would be waited for without end."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        with open(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes) -> None:
    """Replaces `path` (0600) whole, flushed to the disk. Raises `DiskFull` or `HomeUnusable`; the
    old content stands then."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART_SUFFIX}")
    with _told(path):
        try:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                reached("state.opened")
                half = len(data) // 2
                file.write(data[:half])
                file.flush()
                reached("state.half")
                file.write(data[half:])
                file.flush()
                reached("state.written")
                os.fsync(file.fileno())
            reached("state.flushed")
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        reached("state.renamed")
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """What was renamed or made in it is there after a power cut. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock(folder: Path) -> int:
    with _told(folder):
        # Close-on-exec: a child that outlives us must not hold the home.
        fd = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise HomeInUse(
                f"another node runs on {folder}: give this one its own folder with --home, or let "
                "one node lend and serve with `mesh serve --lend`"
            ) from error
        except OSError:
            os.close(fd)
            raise
    return fd


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns the system's refusals into sentences."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(f"no space left to write {path}: free some and try again") from error
        raise HomeUnusable(
            f"{path} cannot be used: {error.strerror}; choose another folder with --home"
        ) from error
