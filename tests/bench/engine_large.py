"""What a load of ≥ 2 GB costs the orchestrator: time, bytes it reads, memory; files cold."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from tests.bench.engine_chapter import Chapter, Run
from tests.bench.engine_model import LARGE, written_model
from tests.bench.engine_sides import Setup, Side, deployment


@dataclass(frozen=True)
class Cost:
    ready_s: float
    wire_mb: float
    read_mb: float
    resident_mb: float


def tell_large(run: Run) -> str:
    model = written_model(LARGE, run.models)
    lines = [
        f"A cold load of {model.stat().st_size / 1e6:.0f} MB ({LARGE.describe()}), all layers on "
        "one worker, no delay:",
        "",
        "| | ready | over the wire | the orchestrator reads | its memory |",
        "|---|---|---|---|---|",
    ]
    setup = Setup(model, LARGE.layers, drops_cache=True)
    costs: dict[str, list[Cost]] = {side.name: [] for side in run.sides}
    for _ in range(run.rounds):
        for side in run.sides:
            cost = _cost(side, setup)
            costs[side.name].append(cost)
            run.say(f"large, {side.name}: ready {cost.ready_s:.1f} s, read {cost.read_mb:.0f} MB")
    for name, found in costs.items():
        cells = (
            f"{median(cost.ready_s for cost in found):.1f} s",
            f"{median(cost.wire_mb for cost in found):.1f} MB",
            f"{median(cost.read_mb for cost in found):.0f} MB",
            f"{median(cost.resident_mb for cost in found):.0f} MB",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cost(side: Side, setup: Setup) -> Cost:
    with deployment(side, setup) as deployed:
        assert deployed.line is not None
        total = deployed.line.counts().total
        return Cost(
            deployed.ready_s,
            (total.up_bytes + total.down_bytes) / 1e6,
            deployed.server.io_counters().read_bytes / 1e6,
            deployed.server.memory_info().rss / 1e6,
        )


LARGE_LOAD = Chapter("large", "a load of ≥ 2 GB, cold: what the orchestrator reads", tell_large)
