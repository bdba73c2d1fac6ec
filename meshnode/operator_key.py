"""The operator's key: whoever shows it may take the models' bytes.

It lies in MESH_HOME, made when it is first needed, for its owner alone. `mesh key` prints it, and a
program sends it as `Authorization: Bearer KEY`, which no web page can have a browser do elsewhere
without being asked first. To replace it, remove the file and start the node again.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from meshnode.errors import HomeError
from meshnode.state import read_file, write_durably

KEY_FILE = "operator.key"
_KEY = re.compile(r"mesh-key-[A-Za-z0-9_-]{43}")


def load_or_make_key(home: Path) -> str:
    """The key of this home, which must exist. Raises `HomeError`, `DiskFull`."""
    path = home / KEY_FILE
    try:
        return _load(path)
    except FileNotFoundError:
        _make(path)
    except OSError as error:
        raise HomeError(f"{path} cannot be read ({error.strerror}): move it away") from error
    return load_or_make_key(home)


def _load(path: Path) -> str:
    mode = path.stat().st_mode
    text = read_file(path).decode("ascii", "replace").strip()
    if not _KEY.fullmatch(text):
        raise HomeError(f"{path} is damaged: remove it, and `mesh key` makes another")
    if mode & 0o077:
        raise HomeError(
            f"others on this machine could read {path}: remove it, and `mesh key` makes another"
        )
    return text


def _make(path: Path) -> None:
    """Two processes may be at it: the first one's stays."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    write_durably(part, f"mesh-key-{secrets.token_urlsafe(32)}\n".encode())
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError as error:
        raise HomeError(f"{path} cannot be made: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
