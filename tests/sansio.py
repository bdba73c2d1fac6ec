"""Which modules are sans-IO: those that docs/architecture.md marks with •."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_MARKED = re.compile(r"`([\w/]+\.py)` •")
_FOLDER_CELL = re.compile(r"\| `(\w+/)` \|")


def sans_io_modules() -> list[str]:
    """Paths relative to the repository, as the tables under each package's heading list them."""
    package = ""
    found = []
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for line in text.splitlines():
        if heading := re.match(r"## (\w+):", line):
            package = heading[1]
        folder = _FOLDER_CELL.match(line)
        prefix = f"{package}/{folder[1]}" if folder else f"{package}/"
        if line.startswith("|"):
            found += [prefix + name for name in _MARKED.findall(line)]
    return found
