"""What the engine's benchmark prints: stock beside ours, and what crossed the wire by command."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from tests.bench.engine_measures import Sample, median_sample
from tests.bench.engine_rows import Row
from tests.bench.engine_sides import MESH, STOCK
from tests.bench.rpc_meter import Tally


@dataclass(frozen=True)
class Outcome:
    row: Row
    samples: Mapping[str, tuple[Sample, ...]]

    def medians(self, side: str) -> Sample | None:
        found = self.samples.get(side)
        return median_sample(found) if found else None


def machine() -> str:
    memory_gib = psutil.virtual_memory().total / 2**30
    return (
        f"{platform.system()} {platform.machine()}, {psutil.cpu_count()} cores, "
        f"{memory_gib:.0f} GiB, one thread an engine process"
    )


def results_table(outcomes: tuple[Outcome, ...]) -> str:
    lines = ["| | stock | ours | ours to stock | to reach | |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(_line(outcome) for outcome in outcomes)])


def _line(outcome: Outcome) -> str:
    row, stock, ours = outcome.row, outcome.medians(STOCK), outcome.medians(MESH)
    ratio = verdict = "–"
    if stock and ours:
        ratio = f"{ours.figure / stock.figure:.2f} ×"
        verdict = "yes" if row.goal.reaches(stock, ours) else "**no**"
    cells = (
        row.title,
        _shown(stock, row.unit),
        _shown(ours, row.unit),
        ratio,
        row.goal.text,
        verdict,
    )
    return f"| {' | '.join(cells)} |"


def _shown(sample: Sample | None, unit: str) -> str:
    if sample is None:
        return "–"
    return f"{sample.figure:.2f} s" if unit == "s" else f"{sample.figure:.1f}"


def commands_table(outcome: Outcome) -> str:
    """By command: the load, or what one token (a prefill: all of it) takes."""
    found = {
        side: (samples[-1].load if outcome.row.load_is_shown else samples[-1].each)
        for side, samples in outcome.samples.items()
        if samples
    }
    if not any(counts.commands for counts in found.values()):
        return ""
    names = sorted({name for counts in found.values() for name in counts.commands})
    heads = [f"{side}: {what}" for side in found for what in ("messages", "up", "down")]
    lines = [
        f"{outcome.row.title}:",
        "",
        f"| | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for name in names:
        tallies = [counts.commands.get(name, Tally()) for counts in found.values()]
        lines.append(f"| {name} | {' | '.join(_tally(tally) for tally in tallies)} |")
    lines.append(f"| **all** | {' | '.join(_tally(counts.total) for counts in found.values())} |")
    rounds = " | ".join(f"{_number(counts.rounds)} | | " for counts in found.values())
    lines.append(f"| **round trips** | {rounds} |")
    if any(counts.pushed_bytes for counts in found.values()):
        pushed = " | ".join(f"{_bytes(counts.pushed_bytes)} | | " for counts in found.values())
        lines.append(f"| worker to worker | {pushed} |")
    return "\n".join(lines)


def _tally(tally: Tally) -> str:
    messages = tally.requests + tally.replies
    return f"{_number(messages)} | {_bytes(tally.up_bytes)} | {_bytes(tally.down_bytes)}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.2f}"


def _bytes(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.1f} MB"
    return f"{value / 1e3:.1f} KB" if value >= 1e3 else f"{value:.0f} B"
