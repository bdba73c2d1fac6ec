"""What was seen in each cell: kept in seen.json, shown in docs/nat-matrix.md."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.netlab.expected import BIRTHDAY_SHARE, CELLS, Cell
from tests.netlab.tries import Try

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).with_name("seen.json")


@dataclass(frozen=True)
class Seen:
    """agreed: how many of the tries ended as expected. outcomes, links: how many of each.
    said: an error of a try that did not agree. run: which one the tries are of (`this_run`)."""

    tries: int = 0
    agreed: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    links: dict[str, int] = field(default_factory=dict)
    first_byte_s: list[float] = field(default_factory=list)
    direct_s: list[float] = field(default_factory=list)
    said: str = ""
    run: str = ""

    def is_good(self, cell: Cell) -> bool:
        share = BIRTHDAY_SHARE if cell.way.guesses else 1.0
        return self.tries > 0 and self.agreed >= share * self.tries


def summed(cell: Cell, tries: Sequence[Try], run: str = "") -> Seen:
    agreed = [one for one in tries if one.agrees(cell)]
    wrong = [one.said or one.outcome.value for one in tries if not one.agrees(cell)]
    return Seen(
        len(tries),
        len(agreed),
        dict(Counter(one.outcome.value for one in tries)),
        dict(Counter(one.link for one in tries if one.link)),
        [round(one.first_byte_s, 3) for one in tries if one.first_byte_s is not None],
        [round(one.direct_s, 3) for one in tries if one.direct_s is not None],
        wrong[-1][:300] if wrong else "",
        run,
    )


def this_run(at_once: int) -> str:
    """When it began, how many cells at a time, and at which commit: a run of some cells leaves the
    others' rows as they are, so that those of many stand side by side."""
    began = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {at_once} at once"
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changes = _git("status", "--porcelain", "--", "tunnels", "discovery")
    except (OSError, subprocess.CalledProcessError):
        return began  # no clone: an archive of the sources
    return f"{began}, at {commit}" + (" with changes" if changes else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()


def load() -> dict[str, Seen]:
    if not RESULTS.exists():
        return {}
    rows = json.loads(RESULTS.read_text())
    return {name: Seen(**row) for name, row in rows.items() if name in CELLS}


def save(seen: dict[str, Seen]) -> None:
    rows = [
        f"{json.dumps(name)}: {json.dumps(asdict(seen[name]))}" for name in CELLS if name in seen
    ]
    RESULTS.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def times(values: Sequence[float]) -> str:
    """Median and worst."""
    if not values:
        return "–"
    return f"{statistics.median(values):.2f} / {max(values):.2f} s"
