"""docs/sanitizers.md: what the last run of each found."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from tests.engine.sanitizers.build import Sanitizer

if TYPE_CHECKING:
    from tests.engine.sanitizers.run import Sanitation

PAGE = Path(__file__).resolve().parents[3] / "docs" / "sanitizers.md"
_BEGIN = "<!-- written by ./just engine-sanitize --write -->"
_NAMES = {
    Sanitizer.ADDRESS: "AddressSanitizer, UndefinedBehaviorSanitizer",
    Sanitizer.THREAD: "ThreadSanitizer",
}
_COLUMNS = (
    "date",
    "commit",
    "engine",
    "llama-server",
    "tests passed",
    "failed",
    "skipped",
    "two servers",
    "operations",
    "reports",
    "minutes",
)


def head_commit() -> str:
    command = ["git", "-C", str(PAGE.parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write_page(results: Sequence[Sanitation], left_out: Mapping[str, str]) -> None:
    """A sanitizer that was not run keeps the line of its last run."""
    head, _, last = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    rows = {result.sanitizer: _line(result) for result in results}
    for sanitizer, name in _NAMES.items():
        kept = [line for line in last.splitlines() if line.startswith(f"| {name} |")]
        rows.setdefault(sanitizer, "".join(kept))
    lines = [f"| | {' | '.join(_COLUMNS)} |", "|---" * (len(_COLUMNS) + 1) + "|"]
    lines += [rows[sanitizer] for sanitizer in _NAMES if rows[sanitizer]]
    lines += ["", "Left out: " + "; ".join(f"`{name}` ({why})" for name, why in left_out.items())]
    PAGE.write_text(f"{head}{_BEGIN}\n\n" + "\n".join(lines) + ".\n", encoding="utf-8")


def _line(result: Sanitation) -> str:
    tests = result.tests
    failed = tests.get("failed", 0) + tests.get("error", 0)
    fields: list[object] = [_NAMES[result.sanitizer]]
    fields += [date.today().isoformat(), f"`{head_commit()}`", f"`{result.engine.engine_key}`"]
    fields += ["sanitized" if result.engine.own_client else "as shipped"]
    fields += [tests.get("passed", 0), failed, tests.get("skipped", 0)]
    fields += ["passed" if result.two_servers else "failed"]
    fields += [f"{result.operations} passed, {result.operations_failed} failed"]
    fields += [len(result.reports), f"{result.minutes:.0f}"]
    return f"| {' | '.join(map(str, fields))} |"
