"""Does the series fit another version of the source than the pinned one?

The pinned tree with its commits and the other tree lie in one repository, so that git can merge
three ways: from the pinned source to the other one, and to the patch. Where the two collide the
patch is said not to apply, and the collision is settled in its favour, only so that the patches
after it can be tried for themselves.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from meshnode.engine import cache, patch_tree
from meshnode.engine.compile import CompileJob, run_cmake
from meshnode.engine.patches import Upstream, read_series
from meshnode.engine.source import Progress, download, extract_tree
from meshnode.engine.toolchain import Backend, default_jobs, find_toolchain
from meshnode.errors import UsageError

_VERSION = re.compile(r"[0-9][0-9A-Za-z.+!-]*")
_AM = ("am", "-q", "--no-3way", "--keep-cr", "--whitespace=nowarn", "--no-gpg-sign")
_FAILED_HUNK = re.compile(r"error: patch failed: (.+):\d+")
# Fetches what is named and lays it out in a folder.
Fetch = Callable[[Upstream, Path], None]


class Fit(Enum):
    EXACT = "applies"
    MERGED = "applies by a three-way merge"
    FAILED = "does not apply"


@dataclass(frozen=True)
class Tried:
    """One patch, and where it did not fit: file and number of places, or 0 for the whole file."""

    patch: str
    fit: Fit
    places: tuple[tuple[str, int], ...] = ()


def fetch_tree(wanted: Upstream, target: Path) -> None:
    extract_tree(download(wanted, target.parent), wanted.subdir, target)


def try_series(
    version: str,
    tree: Path,
    progress: Progress,
    *,
    offline: bool = False,
    fetch: Fetch = fetch_tree,
) -> tuple[Tried, ...]:
    """Try every patch on the sdist of `version`; `tree` is left as a git tree with one commit a
    patch, collisions settled as said above.

    Raises `UsageError` for what is no version and for a tree that is there, `SourceUnavailable`.
    """
    if not _VERSION.fullmatch(version):
        raise UsageError(f"{version!r} is no version number: name one such as 0.3.35")
    series = read_series()
    other = replace(series.upstream, version=version, sha256="")
    patch_tree.edit(tree, progress, offline=offline)
    commits = patch_tree.run_git(tree, "rev-list", "--reverse", "upstream..HEAD").split()
    with tempfile.TemporaryDirectory(prefix="mesh-sdist-") as scratch:
        progress(0, 0, f"fetching {other.package} {version} with pip (70 MB)")
        fetch(other, Path(scratch) / "tree")
        _change_source(tree, Path(scratch) / "tree", version)
    tried = []
    for patch, commit in zip(series.patches, commits, strict=True):
        progress(0, 0, patch.name)
        tried.append(_try_patch(tree, patch, commit))
    return tuple(tried)


def compile_tried(tree: Path, progress: Progress) -> None:
    """Compile what `try_series` left, and keep nothing of it. Raises `BuildFailed`."""

    def on_wait() -> None:
        progress(0, 0, "another build is running on this machine: waiting for it to end")

    folder = cache.engine_cache_dir()
    with (
        cache.build_lock(on_wait) as lock,
        tempfile.TemporaryDirectory(dir=folder, prefix=".tried-") as scratch,
    ):
        job = CompileJob(
            source=tree,
            build=Path(scratch),
            log=folder / "logs" / "tried.log",
            backend=Backend.CPU,
            toolchain=find_toolchain(Backend.CPU),
            commit="tried",
            jobs=default_jobs(),
            lock_fd=lock.fileno(),
        )
        run_cmake(job, progress)


def _change_source(tree: Path, unpacked: Path, version: str) -> None:
    """A second root beside the pinned one; the tag `upstream` then names the other version."""
    patch_tree.run_git(tree, "checkout", "-q", "--orphan", "tried")
    patch_tree.run_git(tree, "rm", "-rfq", ".")
    patch_tree.copy_tree(unpacked, tree)
    patch_tree.commit_all(tree, f"upstream {version}")
    patch_tree.run_git(tree, "tag", "-f", "upstream")


def _try_patch(tree: Path, patch: Path, commit: str) -> Tried:
    refused = _refusal(tree, *_AM, str(patch.resolve()))
    if refused is None:
        return Tried(patch.name, Fit.EXACT)
    patch_tree.run_git(tree, "am", "--abort")
    if _refusal(tree, "cherry-pick", commit) is None:
        files = dict.fromkeys(_FAILED_HUNK.findall(refused))
        return Tried(patch.name, Fit.MERGED, tuple((file, 1) for file in files))
    places = _collisions(tree)
    patch_tree.run_git(tree, "cherry-pick", "--abort")
    if _refusal(tree, "cherry-pick", "--allow-empty", "-X", "theirs", commit) is not None:
        patch_tree.run_git(tree, "cherry-pick", "--abort")
    return Tried(patch.name, Fit.FAILED, places)


def _refusal(tree: Path, *arguments: str) -> str | None:
    """None when git did it, else what it said."""
    try:
        patch_tree.run_git(tree, *arguments)
    except subprocess.CalledProcessError as error:
        return str(error.stdout.decode(errors="replace"))
    return None


def _collisions(tree: Path) -> tuple[tuple[str, int], ...]:
    listed = patch_tree.run_git(tree, "diff", "--name-only", "--diff-filter=U").split()
    return tuple((name, _marks(tree / name)) for name in listed)


def _marks(path: Path) -> int:
    """0 for a file that one side has no more."""
    if not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return sum(line.startswith("<<<<<<< ") for line in lines)
