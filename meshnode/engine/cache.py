"""Where built engines are kept, and how one is found again.

    engine/
      sources/<sha256>/          llama.cpp as the sdist carries it
      work/<digest>/src, build   the patched tree and ninja's folder; kept, so that the next build
                                 compiles only what differs (the stock tree shares it)
      engines/<cache key>/       engine.json, bin/: a finished engine; it appears by one rename
      logs/                      one build log per cache key
      build.lock                 held while a build runs

Nothing outside `engines/` is ever run by a node, so a build that is cut short is never used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import platformdirs

from meshnode.engine.errors import EngineChanged
from meshnode.errors import EngineError

Stamp = tuple[int, int, int]  # size, mtime in ns, inode
BINARIES = ("llama-server", "ggml-rpc-server", "llama-bench", "llama-cli")
RECORD_NAME = "engine.json"


@dataclass(frozen=True)
class Engine:
    """A finished engine. `key` is equal on two nodes exactly when source and patches are."""

    bin_dir: Path
    key: str
    backend: str
    stock: bool
    source: str
    compiler: str
    cpu: str
    sha256: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Of each program as it was built; empty for engines that others built."""
    stamps: Mapping[str, Stamp] = field(default_factory=dict, compare=False)
    """Of each program as this process found it."""

    def binary(self, name: str) -> Path:
        return self.bin_dir / name

    def program(self, name: str) -> Path:
        """`binary(name)`, sure to be the one that this process found at its start, or another copy
        of it: operations may be numbered otherwise in any other. Raises `EngineChanged`."""
        path = self.binary(name)
        stamp = _stamp(path)
        if stamp is None:
            raise EngineChanged(path, "is missing or cannot be run")
        if stamp != self.stamps.get(name, stamp) and digest_of(path) != self.sha256.get(name):
            raise EngineChanged(path, "is another program than at this node's start")
        return path


def cache_dir() -> Path:
    """MESH_CACHE, or the user's cache folder for `mesh`."""
    named = os.environ.get("MESH_CACHE")
    return Path(named).expanduser().absolute() if named else platformdirs.user_cache_path("mesh")


def engine_cache_dir() -> Path:
    return cache_dir() / "engine"


def finished_engines() -> Iterator[Engine]:
    """Every finished engine in the cache, the newest first. Raises `EngineError`."""
    folder = engine_cache_dir() / "engines"
    try:
        records = list(folder.glob(f"*/{RECORD_NAME}"))
        records.sort(key=lambda record: record.stat().st_mtime_ns, reverse=True)
    except OSError as error:
        raise EngineError(
            f"{folder} cannot be looked at ({error.strerror}): set MESH_CACHE to a folder of "
            "your own"
        ) from error
    for record in records:
        engine = _read_record(record)
        if engine is not None:
            yield engine


def load_engine(bin_dir: Path) -> Engine:
    """The engine whose binaries lie in `bin_dir`.

    A folder that `mesh engine build` did not make has no record: its key is the digest of its
    ggml-rpc-server, which equals no built engine's.
    """
    engine = _read_record(bin_dir.parent / RECORD_NAME)
    if engine is not None:
        return engine
    digest = digest_of(bin_dir / "ggml-rpc-server")
    return Engine(
        bin_dir,
        key=f"foreign-{digest[:16]}",
        backend="unknown",
        stock=False,
        source=str(bin_dir),
        compiler="unknown",
        cpu="unknown",
        stamps=_stamps(bin_dir),
    )


def whole_engine(folder: Path) -> Engine | None:
    """The finished engine in this folder of the cache, if each program is as it was built."""
    engine = _read_record(folder / RECORD_NAME)
    if engine is None or len(engine.stamps) < len(BINARIES):
        return None
    as_built = (digest_of(engine.binary(name)) == engine.sha256[name] for name in engine.sha256)
    return engine if all(as_built) else None


def digest_of(path: Path) -> str:
    """Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamps(bin_dir: Path) -> dict[str, Stamp]:
    found = {name: _stamp(bin_dir / name) for name in BINARIES}
    return {name: stamp for name, stamp in found.items() if stamp is not None}


def _stamp(path: Path) -> Stamp | None:
    """None where there is no program to be run."""
    try:
        found = path.stat()
    except OSError:
        return None
    runs = stat.S_ISREG(found.st_mode) and os.access(path, os.X_OK)
    return (found.st_size, found.st_mtime_ns, found.st_ino) if runs else None


def write_record(folder: Path, engine: Engine) -> None:
    fields = asdict(engine)
    del fields["bin_dir"], fields["stamps"]  # the folder may be moved or be seen by another name
    (folder / RECORD_NAME).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def _read_record(record: Path) -> Engine | None:
    bin_dir = record.parent / "bin"
    try:
        fields = json.loads(record.read_text(encoding="utf-8"))
        engine = Engine(bin_dir=bin_dir, stamps=_stamps(bin_dir), **fields)
    except (OSError, ValueError, TypeError):
        return None
    return engine if all((bin_dir / name).is_file() for name in BINARIES) else None


@contextmanager
def build_lock(on_wait: Callable[[], None]) -> Iterator[IO[bytes]]:
    """Only one build at a time writes to the cache; `on_wait` is called before waiting.

    The yielded file is handed to the compiler's processes too: should this process be killed, the
    lock stays with them until the last is gone, so that no second build meets a first one's.
    """
    folder = engine_cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
