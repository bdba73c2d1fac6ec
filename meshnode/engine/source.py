"""llama.cpp's source: the sdist of llama-cpp-python, fetched by pip and checked by its sha256.

pip is asked rather than the index, so that the user's own index, proxy and certificates hold.
Asking it for an sdist makes it run the package's metadata hook (scikit-build-core), which finds
cmake and ninja on the PATH it is given here.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import blake3

from meshnode.engine.cache import engine_cache_dir
from meshnode.engine.errors import NoRoomToBuild, SourceOutOfReach, SourceUnavailable
from meshnode.engine.patches import Upstream
from meshnode.engine.toolchain import tool_paths

Progress = Callable[[int, int, str], None]

MIN_TREE_FILES = ("CMakeLists.txt", "ggml/CMakeLists.txt", "tools/server/CMakeLists.txt")
# Test vocabularies, pages and pictures: two thirds of the bytes, and nothing a build reads.
LEFT_OUT = frozenset(("models", "docs", "media", ".git"))
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """A llama.cpp tree, not to be written to. `digest` names its content."""

    tree: Path
    digest: str
    origin: str


def named_source(option: Path | None) -> Path | None:
    """What `--source` or MESH_ENGINE_SOURCE names: a checkout, or the sdist as a file."""
    if option is not None:
        return option
    named = os.environ.get("MESH_ENGINE_SOURCE")
    return Path(named).expanduser() if named else None


def source_digest(named: Path | None, upstream: Upstream) -> str:
    """The digest `open_source` will give, without fetching anything."""
    if named is None or named.is_file():
        return upstream.sha256
    _check_checkout(named)
    return tree_digest(named)


def open_source(
    named: Path | None, upstream: Upstream, progress: Progress, *, offline: bool = False
) -> Source:
    """The tree to build from, fetched if need be; not when `offline`. Raises
    `SourceUnavailable`."""
    if named is not None and not named.is_file():
        _check_checkout(named)
        return Source(named, tree_digest(named), f"checkout {named}")
    origin = f"{upstream.package} {upstream.version}"
    tree = engine_cache_dir() / "sources" / upstream.sha256
    if not tree.is_dir():
        if named is None and offline:
            raise SourceOutOfReach
        tree.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=tree.parent, prefix=".fetch-") as scratch:
            if named is None:
                progress(0, 0, f"fetching {origin} with pip (70 MB)")
            sdist = named or download(upstream, Path(scratch))
            check_sha256(sdist, upstream.sha256)
            progress(0, 0, f"unpacking {origin}")
            extract_tree(sdist, upstream.subdir, Path(scratch) / "tree")
            (Path(scratch) / "tree").rename(tree)
    return Source(tree, upstream.sha256, origin)


def _check_checkout(folder: Path) -> None:
    missing = [name for name in MIN_TREE_FILES if not (folder / name).is_file()]
    if missing:
        raise SourceUnavailable(
            f"{folder} is not a llama.cpp checkout ({missing[0]} is missing): name the folder "
            "with --source or MESH_ENGINE_SOURCE, or leave both out to have it fetched"
        )


def tree_files(tree: Path) -> Iterator[Path]:
    """Relative paths of the tree's files, sorted, without what no build reads."""

    def walk(folder: Path) -> Iterator[Path]:
        for entry in sorted(folder.iterdir()):
            at_top = folder == tree
            if entry.name == ".git" or (
                at_top
                and (entry.name in LEFT_OUT or entry.name.startswith("build"))
                and entry.is_dir()
            ):
                continue
            if entry.is_dir() and not entry.is_symlink():
                yield from walk(entry)
            elif entry.is_file():
                yield entry.relative_to(tree)

    return walk(tree)


def tree_digest(tree: Path) -> str:
    """BLAKE3 over names and contents: about 60 MB, a tenth of a second."""
    digest = blake3.blake3()
    for path in tree_files(tree):
        name = path.as_posix().encode()
        content = (tree / path).read_bytes()
        digest.update(b"%d %d " % (len(name), len(content)) + name + content)
    return "tree-" + digest.hexdigest()


def check_sha256(sdist: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with sdist.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise SourceUnavailable(
            f"{sdist.name} has sha256 {digest.hexdigest()[:16]}…, but {expected[:16]}… is pinned: "
            "it is damaged or not the one meant, so remove it where it comes from (try "
            "`python -m pip cache purge`) and run the build again"
        )


def download(upstream: Upstream, scratch: Path) -> Path:
    """Its sdist, into `scratch`, from the index that pip is configured for. Without a sha256 it is
    what the index serves: not for engines that nodes run."""
    wanted = scratch / "sdist.txt"
    pin = f" --hash=sha256:{upstream.sha256}" if upstream.sha256 else ""
    wanted.write_text(f"{upstream.package}=={upstream.version}{pin}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--progress-bar", "off", "--disable-pip-version-check"]
    command += ["--no-binary", upstream.package]
    command += ["--require-hashes"] if upstream.sha256 else []
    command += ["--dest", str(scratch), "--requirement", str(wanted)]
    cmake, ninja = tool_paths()
    path = os.pathsep.join((str(cmake.parent), str(ninja.parent), os.environ.get("PATH", "")))
    run = subprocess.run(
        command,
        env={**os.environ, "PATH": path, "TMPDIR": str(scratch)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if run.returncode != 0:
        raise _explain_pip(run.stdout.decode(errors="replace"), upstream, scratch)
    found = list(scratch.glob("*.tar.gz"))
    if len(found) != 1:
        raise SourceUnavailable(f"pip downloaded no sdist of {upstream.package}: run it by hand")
    return found[0]


_OFFERED = re.compile(r"\(from versions: ([^)]+)\)")
_UNREACHABLE = (
    "No matching distribution",
    "Temporary failure in name resolution",
    "Failed to establish a new connection",
    "Connection refused",
    "Max retries exceeded",
    "timed out",
    "ProxyError",
)


def _explain_pip(
    output: str, upstream: Upstream, scratch: Path
) -> SourceUnavailable | NoRoomToBuild:
    what = f"{upstream.package} {upstream.version}"
    if "No space left on device" in output:
        return NoRoomToBuild(scratch.parent)
    if "DO NOT MATCH THE HASHES" in output:
        return SourceUnavailable(
            f"the index serves a {what} whose sha256 is not the pinned one: use another index "
            "(pip's --index-url setting), or build from a checkout with --source DIR"
        )
    if "No module named pip" in output:
        return SourceUnavailable(
            f"fetching {what} needs pip in this Python: run `{sys.executable} -m ensurepip`, "
            "or build from a checkout with --source DIR"
        )
    offered = _OFFERED.search(output)
    if offered and offered[1] != "none":
        newest = ", ".join(offered[1].split(", ")[-3:])
        return SourceUnavailable(
            f"the index has no sdist of {what}: name another version (the newest are {newest})"
        )
    if any(sign in output for sign in _UNREACHABLE):
        return SourceUnavailable(
            f"pip could not fetch {what}: connect this machine to the package index once, "
            "or build from a llama.cpp checkout or a saved sdist with --source PATH"
        )
    errors = [line for line in output.splitlines() if "error" in line.lower()]
    last = (errors or output.splitlines() or ["it said nothing"])[-1].strip()
    return SourceUnavailable(
        f"pip could not fetch {what} ({last}): try `{sys.executable} -m pip download --no-deps "
        f"--no-binary {upstream.package} {upstream.package}=={upstream.version}`"
    )


def extract_tree(sdist: Path, subdir: str, target: Path) -> None:
    """Unpack `<top folder>/<subdir>/…` of the sdist into `target`.

    Only plain files and folders with plain names: `tarfile`'s own filters are missing in the first
    patch releases of Python 3.11.
    """
    prefix = PurePosixPath(subdir).parts
    try:
        with tarfile.open(sdist, "r|gz") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts[1:]
                inner = parts[len(prefix) :]
                if parts[: len(prefix)] != prefix or not inner or inner[0] in LEFT_OUT:
                    continue
                if ".." in inner or not (member.isfile() or member.isdir()):
                    raise SourceUnavailable(f"{sdist.name} holds {member.name!r}: not as pinned")
                _extract(archive, member, target.joinpath(*inner))
    except (tarfile.TarError, EOFError) as error:
        raise SourceUnavailable(f"{sdist.name} is not a readable archive: {error}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoRoomToBuild(target.parent) from error
        raise
    if not target.is_dir():
        raise SourceUnavailable(f"{sdist.name} has no folder {subdir}: it is not as pinned")


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    content = archive.extractfile(member)
    assert content is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    with content, path.open("wb") as file:
        shutil.copyfileobj(content, file)
    path.chmod(0o755 if member.mode & 0o100 else 0o644)
