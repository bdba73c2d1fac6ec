"""Short private folders for sockets.

A unix socket's path is limited to about 100 bytes (108 on Linux, 104 on macOS, the final NUL
included), and MESH_HOME may lie deep, so sockets live apart from it: under XDG_RUNTIME_DIR where
that is given, short and ours, else under /tmp, in a folder named after a hash of the home.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from blake3 import blake3

from meshnode.errors import HomeError

MAX_SOCKET_PATH_BYTES = 100
LONGEST_SOCKET_NAME_CHARS = 32
"""What callers may add below the runtime folder, the slash included."""

_HASH_HEX_CHARS = 12


def runtime_folder(home: Path) -> Path:
    """The folder for this home's sockets, made if absent: ours, 0700, short.

    Raises `HomeError` where something else sits at its place or belongs to somebody else: in /tmp
    anyone can make a name first.
    """
    name = blake3(os.fsencode(home.resolve())).hexdigest()[:_HASH_HEX_CHARS]
    parent = _runtime_parent(name)
    _private_folder(parent)
    folder = parent / name
    _private_folder(folder)
    return folder


def socket_path(folder: Path, name: str) -> Path:
    """`folder/name`, refused with `HomeError` where a socket could not be bound to it."""
    path = folder / name
    check_socket_path(path)
    return path


def check_socket_path(path: Path) -> None:
    """Raises `HomeError` where the path is too long for a socket."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise HomeError(
            f"the path {path} is too long for a socket: set XDG_RUNTIME_DIR to a shorter folder"
        )


def _runtime_parent(name: str) -> Path:
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if given.startswith("/") and _is_ours(Path(given)):
        parent = Path(given) / "mesh"
        longest = len(os.fsencode(parent / name)) + LONGEST_SOCKET_NAME_CHARS
        if longest <= MAX_SOCKET_PATH_BYTES:
            return parent
    return Path("/tmp") / f"mesh-{os.getuid()}"  # noqa: S108 - checked for owner and mode


def _is_ours(folder: Path) -> bool:
    try:
        found = folder.stat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and os.access(folder, os.W_OK)
    )


def _private_folder(folder: Path) -> None:
    """Makes `folder` 0700, or checks that it is a real folder, ours, and closed to others."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise HomeError(f"the folder {folder} cannot be made: {error.strerror}") from error
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise HomeError(
            f"{folder} belongs to somebody else: remove it, or set XDG_RUNTIME_DIR to a folder "
            "of your own"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)
