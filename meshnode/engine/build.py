"""From source and patches to four binaries in the cache, once, however often it is asked for.

The patched tree is laid over a kept work folder file by file, touching only files that differ, so
ninja compiles what a changed patch (or `--stock`) concerns and resumes what was interrupted.
"""

from __future__ import annotations

import errno
import filecmp
import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from meshnode.engine import cache
from meshnode.engine.cache import Engine, load_engine
from meshnode.engine.compile import CompileJob, run_cmake
from meshnode.engine.errors import CacheUnwritable, NoCompiler, NoRoomToBuild, PatchFailed
from meshnode.engine.patches import PatchSeries, apply_series, engine_key_of, read_series
from meshnode.engine.source import (
    Progress,
    named_source,
    open_source,
    source_digest,
    tree_files,
)
from meshnode.engine.toolchain import (
    Backend,
    Toolchain,
    cpu_identity,
    default_jobs,
    detect_backend,
    find_toolchain,
    parse_backend,
)

__all__ = ["BuildOptions", "Engine", "build_engine", "engine_key", "find_built", "find_engine"]

MIN_FREE_BYTES = 700 * 10**6
_NOT_OURS_TO_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
# Part of the cache key: raise it when flags or targets change.
RECIPE = 1


@dataclass(frozen=True)
class BuildOptions:
    """None: detected (backend), the pinned sdist (source), one a core (jobs). offline: nothing is
    fetched."""

    backend: str | None = None
    source: Path | None = None
    jobs: int | None = None
    stock: bool = False
    offline: bool = False


def find_engine(stock: bool = False, backend: str | None = None) -> Path | None:
    """The `bin` folder of the engine built from the present source and patches, or None.

    Without `backend`: the detected one's engine, else whichever was built last.
    """
    engine = find_built(stock=stock, backend=backend)
    return engine.bin_dir if engine else None


def find_built(*, stock: bool = False, backend: str | None = None) -> Engine | None:
    """As `find_engine`, with all that is known about it."""
    series = read_series()
    digest = source_digest(named_source(None), series.upstream)
    wanted = parse_backend(backend) if backend else None
    return _find(_key(digest, series, stock=stock), wanted)


def _find(key: str, backend: Backend | None) -> Engine | None:
    cpu = cpu_identity()
    here = [found for found in cache.finished_engines() if found.key == key and found.cpu == cpu]
    first = backend or detect_backend()
    matches = [found for found in here if found.backend == first] or ([] if backend else here)
    if not matches:
        return None
    try:
        identity = find_toolchain(Backend(matches[0].backend)).identity
    except NoCompiler:  # what is built still runs where the compiler was removed
        return matches[0]
    return next((found for found in matches if found.compiler == identity), None)


def engine_key(engine: Engine | Path) -> str:
    """Short digest of source and patches; equal on nodes whose op numbering must be equal."""
    return (load_engine(engine) if isinstance(engine, Path) else engine).key


def _key(digest: str, series: PatchSeries, *, stock: bool) -> str:
    return engine_key_of(digest, series, stock=stock)


def build_engine(options: BuildOptions, progress: Progress) -> Engine:
    """The engine for `options`, built now unless the cache has it. Blocks for minutes.

    `progress(done, total, line)`: compile steps; total is 0 in the stages before.
    Raises `NoCompiler`, `SourceUnavailable`, `PatchFailed`, `BuildFailed`, `NoRoomToBuild`.
    """
    series = read_series()
    named = named_source(options.source)
    backend = parse_backend(options.backend) if options.backend else detect_backend()
    toolchain = find_toolchain(backend)
    key = _key(source_digest(named, series.upstream), series, stock=options.stock)
    wanted = _Wanted(key, backend, toolchain, options.stock, cpu_identity())
    found = wanted.find()
    if found is not None:
        return found

    def on_wait() -> None:
        progress(0, 0, "another build is running on this machine: waiting for it to end")

    try:
        _check_disk()
        with cache.build_lock(on_wait) as lock:
            found = wanted.find()
            if found is not None:
                return found
            source = open_source(named, series.upstream, progress, offline=options.offline)
            work = cache.engine_cache_dir() / "work" / wanted.work_name()
            _lay_out(source.tree, series, work / "src", stock=options.stock)
            job = CompileJob(
                source=work / "src",
                build=work / "build",
                log=cache.engine_cache_dir() / "logs" / f"{wanted.cache_key()}.log",
                backend=backend,
                toolchain=toolchain,
                commit=key,
                jobs=options.jobs or default_jobs(),
                lock_fd=lock.fileno(),
            )
            run_cmake(job, progress)
            return wanted.finish(work / "build" / "bin", source.origin)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoRoomToBuild(cache.engine_cache_dir()) from error
        if error.errno in _NOT_OURS_TO_WRITE:
            raise CacheUnwritable(cache.engine_cache_dir(), error) from error
        raise


@dataclass(frozen=True)
class _Wanted:
    """What makes one build differ from another."""

    key: str
    backend: Backend
    toolchain: Toolchain
    stock: bool
    cpu: str

    def work_name(self) -> str:
        """Source and patches are left out: those the work folder is brought up to."""
        parts = [str(RECIPE), self.backend, self.toolchain.identity, self.toolchain.cxx, self.cpu]
        parts += self.toolchain.accelerator  # where nvcc lies: cmake keeps what it found beside it
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def cache_key(self) -> str:
        return f"{self.key}-{self.backend}-{self.work_name()}"

    def folder(self) -> Path:
        return cache.engine_cache_dir() / "engines" / self.cache_key()

    def find(self) -> Engine | None:
        return cache.whole_engine(self.folder())

    def finish(self, built: Path, origin: str) -> Engine:
        """Copy the binaries and show them to finders by one rename."""
        engines = self.folder().parent
        engines.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=engines, prefix=".new-"))
        try:
            (scratch / "bin").mkdir()
            for name in cache.BINARIES:
                _copy_durably(built / name, scratch / "bin" / name)
            engine = Engine(
                bin_dir=self.folder() / "bin",
                key=self.key,
                backend=str(self.backend),
                stock=self.stock,
                source=origin,
                compiler=self.toolchain.identity,
                cpu=self.cpu,
                sha256={name: cache.digest_of(scratch / "bin" / name) for name in cache.BINARIES},
            )
            cache.write_record(scratch, engine)
            shutil.rmtree(self.folder(), ignore_errors=True)  # a damaged one: we hold the lock
            scratch.chmod(0o755)
            scratch.rename(self.folder())
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return load_engine(engine.bin_dir)


def _copy_durably(source: Path, target: Path) -> None:
    """A rename may reach the disk before the data does: after a power cut, an empty binary."""
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer)
        writer.flush()
        os.fsync(writer.fileno())
    target.chmod(0o755)


def _check_disk() -> None:
    folder = cache.engine_cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
        raise NoRoomToBuild(folder)


def _lay_out(tree: Path, series: PatchSeries, target: Path, *, stock: bool) -> None:
    """Make `target` equal to the tree with the series applied, touching only what differs."""
    patched = [name for name in series.new_files() if (tree / name).exists()]
    if stock and patched:
        raise PatchFailed(
            f"{tree} is patched already ({patched[0]} is there): name an unpatched llama.cpp, or "
            "leave --stock out"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tree-") as scratch:
        staged = Path(scratch)
        for path in tree_files(tree):
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / path, staged / path)
        if not stock and not patched:
            apply_series(series, staged)
        _bring_up_to(target, staged)


def _bring_up_to(target: Path, wanted: Path) -> None:
    """A file that differs is replaced and so gets a new mtime, which is what ninja looks at."""
    files = set(tree_files(wanted))
    for path in list(tree_files(target)) if target.is_dir() else []:
        if path not in files:
            (target / path).unlink()
    for path in files:
        old, new = target / path, wanted / path
        if old.is_file() and filecmp.cmp(old, new, shallow=False):
            continue
        old.parent.mkdir(parents=True, exist_ok=True)
        new.replace(old)
        os.utime(old)
