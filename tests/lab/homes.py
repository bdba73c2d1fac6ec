"""Homes of nodes, as they lie on a disk."""

from __future__ import annotations

import shutil
from pathlib import Path


def copy_home(home: Path, copy: Path) -> None:
    """A backup of a home in use. What is half written is left out: it is gone before it can be
    copied, and the next start sweeps it."""
    shutil.copytree(home, copy, ignore=shutil.ignore_patterns("*.part"))
