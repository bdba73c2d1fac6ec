"""docs/engine-ops.md: the counts of the last whole run, and what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from tests.engine.compiling import engine_key
from tests.engine.ops.cases import Case, Failure, Place
from tests.engine.ops.reasons import REASONS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "engine-ops.md"
_BEGIN = "<!-- written by ./just engine-ops --write -->"


def write_page(
    places: Mapping[Case, Place], passed: int, alone: Sequence[Failure], run: str
) -> None:
    """`run`: in words, what was chosen and over which link."""
    head = PAGE.read_text(encoding="utf-8").partition(_BEGIN)[0]
    PAGE.write_text(f"{head}{_BEGIN}\n\n{_tables(places, passed, alone, run)}", encoding="utf-8")


def _tables(places: Mapping[Case, Place], passed: int, alone: Sequence[Failure], run: str) -> str:
    counts = Counter(places.values())
    ops = {case.op for case, place in places.items() if place is Place.WORKER}
    given = counts[Place.WORKER]
    lines = [f"{date.today().isoformat()}, engine `{engine_key()}`, {run}:", ""]
    lines += ["| cases | |", "|---|---|"]
    lines += [f"| {passed:,} of {given:,} | passed on the worker, of {len(ops)} operations |"]
    lines += [f"| {len(alone):,} | fail on the CPU alone as well |"]
    for place in (Place.KEPT, Place.REFUSED, Place.NOBODY):
        lines.append(f"| {counts[place]:,} | {place.value} |")
    lines += [f"| {len(places):,} | in all |", ""]
    if alone:
        lines += ["Failing on the CPU alone:", "", *(f"- `{one.case}`" for one in alone), ""]
    kept = Counter(case.op for case, place in places.items() if place is Place.KEPT)
    every = Counter(case.op for case, place in places.items() if place in _CPU_CAN)
    lines += ["Kept by the orchestrator:", "", "| operation | cases | why |", "|---|---|---|"]
    for op, count in sorted(kept.items()):
        lines.append(f"| {op} | {count:,} of {every[op]:,} | {REASONS[op]} |")
    return "\n".join(lines) + "\n"


_CPU_CAN = (Place.WORKER, Place.KEPT)
