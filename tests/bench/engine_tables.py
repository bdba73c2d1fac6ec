"""What the engine's benchmark prints: stock beside ours, and what crossed the wire by command."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import psutil

from tests.bench.engine_chapter import verdict
from tests.bench.engine_measures import Sample, median_sample
from tests.bench.engine_rows import NO_GOAL, Row
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


def count_rounds(rounds: int) -> str:
    return f"{rounds} rounds" if rounds > 1 else "1 round"


HEAD = (
    "| | stock | ours | ours to stock | to reach | | measured |",
    "|---|---|---|---|---|---|---|",
)


def results_table(lines: Sequence[str]) -> str:
    return "\n".join((*HEAD, *lines))


def result_line(outcome: Outcome) -> str:
    row, stock, ours = outcome.row, outcome.medians(STOCK), outcome.medians(MESH)
    ratio = reached = "–"
    if stock and ours:
        ratio = f"{ours.figure / stock.figure:.2f} ×"
        reached = "–" if row.goal is NO_GOAL else verdict(row.goal.reaches(stock, ours))
    rounds = max(len(samples) for samples in outcome.samples.values())
    cells = (
        row.title,
        _shown(row, stock),
        _shown(row, ours),
        ratio,
        row.goal.text,
        reached,
        f"{datetime.now(UTC).date()}, {count_rounds(rounds)}",
    )
    return f"| {' | '.join(cells)} |"


def with_line(table: str, line: str) -> str:
    """The table with this line in the place of the one of the same title, or at its end."""
    title = line.split(" | ")[0]
    lines = [found for found in table.splitlines() if found.startswith("|")][len(HEAD) :]
    titles = [found.split(" | ")[0] for found in lines]
    if title in titles:
        lines[titles.index(title)] = line
    else:
        lines.append(line)
    return results_table(lines)


def _shown(row: Row, sample: Sample | None) -> str:
    if sample is None:
        return "–"
    figure = f"{sample.figure:.2f} s" if row.unit == "s" else f"{sample.figure:.1f}"
    detail = row.detail(sample)
    return f"{figure} ({detail})" if detail else figure


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
