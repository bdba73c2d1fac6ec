"""The patches as a git tree to work in, and back: one commit a patch, no byte changed on the way.

`edit` makes a repository whose tag `upstream` is the pristine source and whose commits are the
series; `export` writes `upstream..HEAD` back. The options pin down everything that git's version
or a user's configuration could change (the format is described in patches/llama.cpp/README.md).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from meshnode.engine.cache import engine_cache_dir
from meshnode.engine.errors import PatchFailed
from meshnode.engine.patches import GIT_ENVIRONMENT, PatchSeries, read_series
from meshnode.engine.source import Progress, named_source, open_source, tree_files
from meshnode.engine.toolchain import install_command
from meshnode.errors import UsageError

_IDENTITY = {
    "GIT_AUTHOR_NAME": "mesh",
    "GIT_AUTHOR_EMAIL": "mesh@localhost",
    "GIT_COMMITTER_NAME": "mesh",
    "GIT_COMMITTER_EMAIL": "mesh@localhost",
}
_PRISTINE_DATE = "2026-01-01T00:00:00Z"
_SETTINGS = {
    "core.autocrlf": "false",
    "core.abbrev": "40",
    "core.fileMode": "false",
    "commit.gpgSign": "false",
    "user.name": "mesh",
    "user.email": "mesh@localhost",
}
_AM = (
    *("am", "-q", "--keep-cr", "--no-3way", "--whitespace=nowarn"),
    *("--committer-date-is-author-date", "--no-gpg-sign"),
)
_FORMAT_PATCH = (
    *("format-patch", "-q", "--full-index", "--no-signature", "--zero-commit", "-N", "--no-stat"),
    *("-p", "--no-renames", "--no-ext-diff", "--no-textconv", "--no-color", "--no-attach"),
    *("--no-thread", "--no-cover-letter", "--no-encode-email-headers"),
    *("--diff-algorithm=histogram", "--src-prefix=a/", "--dst-prefix=b/", "--unified=3"),
    *("--subject-prefix=PATCH", "upstream..HEAD"),
)


def edit(tree: Path, progress: Progress, *, offline: bool = False) -> int:
    """Lay source and series out in `tree`, which must not exist. Returns the number of patches."""
    if tree.exists():
        raise UsageError(
            f"{tree} is there already: export what is in it, then remove it, or name another folder"
        )
    _require_git()
    series = read_series()
    named = named_source(None)
    source = open_source(named, series.upstream, progress, offline=offline)
    progress(0, 0, f"laying out {source.origin}")
    tree.mkdir(parents=True)
    copy_tree(source.tree, tree)
    _commit_pristine(tree)
    for patch in series.patches:
        progress(0, 0, patch.name)
        _apply_as_commit(tree, patch)
    return len(series.patches)


def export(tree: Path, folder: Path | None = None) -> tuple[str, ...]:
    """Write the commits of `tree` to the patches folder; one line for each file that changed."""
    _require_git()
    if not (tree / ".git").is_dir():
        raise UsageError(f"{tree} is no edited engine tree: make one with `./just engine-edit`")
    if run_git(tree, "status", "--porcelain").strip():
        raise UsageError(f"{tree} has changes that are not committed: commit or discard them first")
    series = read_series()
    target = folder or series.folder
    with tempfile.TemporaryDirectory(prefix="mesh-export-") as scratch:
        run_git(tree, *_FORMAT_PATCH, "-o", scratch)
        written = sorted(Path(scratch).glob("*.patch"))
        changed = _replace_patches(target, written)
    listed = "".join(f"{patch.name}\n" for patch in written)
    old_listing = target / "series"
    if not old_listing.is_file() or old_listing.read_text(encoding="utf-8") != listed:
        old_listing.write_text(listed, encoding="utf-8")
        changed = (*changed, "series")
    return changed or ("nothing changed",)


def check_round_trip(progress: Progress, *, offline: bool = False) -> int:
    """Lay out and export into scratch folders. Raises `PatchFailed` naming what came out different.

    Returns the number of patches.
    """
    series = read_series()
    engine_cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=engine_cache_dir(), prefix=".check-") as scratch:
        tree, exported = Path(scratch) / "tree", Path(scratch) / "patches"
        edit(tree, progress, offline=offline)
        exported.mkdir()
        export(tree, exported)
        different = _differences(series, exported)
    if different:
        raise PatchFailed(
            f"the round trip changes {', '.join(different)}: run `./just engine-edit` and "
            "`./just engine-export`, look at the difference and commit it"
        )
    return len(series.patches)


def _differences(series: PatchSeries, exported: Path) -> list[str]:
    here = {patch.name: patch.read_bytes() for patch in series.patches}
    there = {patch.name: patch.read_bytes() for patch in exported.glob("*.patch")}
    unlisted = {path.name for path in series.folder.glob("*.patch")} - set(here)
    names = sorted(set(here) | set(there) | unlisted)
    different = [name for name in names if here.get(name) != there.get(name) or name in unlisted]
    if (series.folder / "series").read_bytes() != (exported / "series").read_bytes():
        different.append("series")
    return different


def _replace_patches(target: Path, written: Sequence[Path]) -> tuple[str, ...]:
    changed = []
    names = {patch.name for patch in written}
    for old in sorted(target.glob("*.patch")):
        if old.name not in names:
            old.unlink()
            changed.append(f"removed {old.name}")
    for patch in written:
        content, path = patch.read_bytes(), target / patch.name
        if not path.is_file() or path.read_bytes() != content:
            path.write_bytes(content)
            changed.append(patch.name)
    return tuple(changed)


def copy_tree(source: Path, target: Path) -> None:
    for path in tree_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, target / path)


def commit_all(tree: Path, message: str) -> None:
    run_git(tree, "add", "-A", "-f")  # -f: upstream's .gitignore hides files that upstream tracks
    dates = {"GIT_AUTHOR_DATE": _PRISTINE_DATE, "GIT_COMMITTER_DATE": _PRISTINE_DATE}
    run_git(tree, "commit", "-q", "-m", message, **dates)


def _commit_pristine(tree: Path) -> None:
    run_git(tree, "-c", "init.defaultBranch=mesh", "init", "-q")
    for key, value in _SETTINGS.items():
        run_git(tree, "config", key, value)
    commit_all(tree, "upstream")
    run_git(tree, "tag", "upstream")


def _apply_as_commit(tree: Path, patch: Path) -> None:
    try:
        run_git(tree, *_AM, str(patch.resolve()))
    except subprocess.CalledProcessError as error:
        output = error.stdout.decode(errors="replace")
        failed = re.search(r"patch failed: (.+):\d+", output)
        raise PatchFailed(
            f"{patch.name} does not apply to {failed[1] if failed else 'the tree'}: mend it in "
            f"{tree} (`git am --continue` there), then `./just engine-export`"
        ) from error


def run_git(tree: Path, *arguments: str, **extra: str) -> str:
    """What it printed. Raises `CalledProcessError`, with that as its `stdout`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    run = subprocess.run(
        ["git", "-C", str(tree), *arguments],  # noqa: S607 - the user's git, from the PATH
        env={**environment, **GIT_ENVIRONMENT, **_IDENTITY, **extra},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
    )
    return run.stdout.decode(errors="replace")


def _require_git() -> None:
    if shutil.which("git") is None:
        raise PatchFailed(f"editing the patches needs git: `{install_command('git')}`")
