"""The patch series: upstream.toml, series and *.patch, and how they are applied for a build.

In a checkout they lie in `patches/llama.cpp`, in a wheel beside this file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

from meshnode.engine.errors import PatchFailed
from meshnode.engine.toolchain import install_command

_HERE = Path(__file__).resolve().parent
_IN_WHEEL = _HERE / "_patches" / "llama.cpp"
_IN_CHECKOUT = _HERE.parent.parent / "patches" / "llama.cpp"
_KEY_HEX_DIGITS = 16


@dataclass(frozen=True)
class Upstream:
    """The pinned sdist, and where in it llama.cpp lies."""

    package: str
    version: str
    sha256: str
    subdir: str


@dataclass(frozen=True)
class PatchSeries:
    """The patches in the order of `series`, and the source they were made for."""

    folder: Path
    upstream: Upstream
    patches: tuple[Path, ...]

    def digest(self) -> str:
        """sha256 over the order and every patch's bytes."""
        digest = hashlib.sha256()
        for patch in self.patches:
            content = patch.read_bytes()
            digest.update(f"{patch.name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    def new_files(self) -> tuple[str, ...]:
        """Paths the series creates: a tree that has them is patched already."""
        found: list[str] = []
        for patch in self.patches:
            text = patch.read_bytes().decode(errors="replace")
            found += re.findall(r"^--- /dev/null\n\+\+\+ b/(\S+)$", text, re.MULTILINE)
        return tuple(found)


def patches_folder() -> Path:
    return _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT


def read_series(folder: Path | None = None) -> PatchSeries:
    """Raises `PatchFailed` when a listed file or the pin is missing."""
    folder = folder or patches_folder()
    try:
        pin = tomllib.loads((folder / "upstream.toml").read_text(encoding="utf-8"))
        upstream = Upstream(pin["package"], pin["version"], pin["sha256"], pin["subdir"])
        lines = (folder / "series").read_text(encoding="utf-8").splitlines()
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise PatchFailed(
            f"the engine's patches in {folder} are incomplete ({error}): install mesh again, or "
            "restore the folder from the repository"
        ) from error
    names = [line.strip() for line in lines]
    patches = tuple(folder / name for name in names if name and not name.startswith("#"))
    for patch in patches:
        if not patch.is_file():
            raise PatchFailed(f"{folder / 'series'} lists {patch.name}, which is not there")
    return PatchSeries(folder, upstream, patches)


def engine_key_of(source_digest: str, series: PatchSeries, *, stock: bool) -> str:
    """Short digest of source and patches, compared between nodes. CPU and compiler are not in."""
    text = f"{source_digest}\n{'stock' if stock else series.digest()}\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:_KEY_HEX_DIGITS]
    return f"stock-{digest}" if stock else digest


def apply_series(series: PatchSeries, tree: Path) -> None:
    """Apply every patch to `tree`, in order. Raises `PatchFailed` naming patch and file."""
    for patch in series.patches:
        run = subprocess.run(
            _apply_command(patch),
            cwd=tree,
            env=_quiet_environment(tree),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if run.returncode != 0:
            output = run.stdout.decode(errors="replace")
            raise PatchFailed(
                f"{patch.name} does not apply to {_failed_file(output)}: the source is not the "
                f"llama.cpp of {series.upstream.package} {series.upstream.version} that the "
                "patches were made for; leave --source and MESH_ENGINE_SOURCE out, or carry the "
                "patch over with `./just engine-edit`"
            )


def _apply_command(patch: Path) -> list[str]:
    if shutil.which("git"):
        return ["git", "apply", "--whitespace=nowarn", str(patch.resolve())]
    if shutil.which("patch"):
        return ["patch", "-p1", "--fuzz=0", "--batch", "--forward", "-i", str(patch.resolve())]
    raise PatchFailed(
        "the engine's patches cannot be applied without `git` or `patch`: install one with "
        f"`{install_command('patch')}`"
    )


# Nobody's configuration may change a byte of what git reads or writes here.
GIT_ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "LC_ALL": "C",
    "TZ": "UTC",
}


def _quiet_environment(tree: Path) -> dict[str, str]:
    # Inside somebody's repository (a home kept in git), `git apply` would skip our files silently.
    ceiling = str(tree.resolve().parent)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return {**environment, **GIT_ENVIRONMENT, "GIT_CEILING_DIRECTORIES": ceiling}


def _failed_file(output: str) -> str:
    """The file named by git ("error: patch failed: FILE:LINE") or patch ("patching file FILE")."""
    for pattern in (r"patch failed: (.+):\d+", r"error: (.+): No such file", r"error: (\S+): "):
        if found := re.search(pattern, output):
            return found[1]
    before_failure = re.split(r"FAILED|can't find file|Skipping|ignored", output)[0]
    named = re.findall(r"patching file '?([^'\n]+)'?", before_failure)
    return named[-1] if named else "the tree"
