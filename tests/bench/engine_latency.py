"""Tokens a second by the delay between nodes, as the seed project published them.

Its figures (three nodes, 0, 5, 10 and 20 ms) rise by about 3.1 ms a token for each ms. It does not
say whether that is one way or there and back, so both readings are measured: a round trip of that
much, and of twice that much.
"""

from __future__ import annotations

from statistics import median

from tests.bench.engine_chapter import Chapter, Run
from tests.bench.engine_measures import tokens_per_s
from tests.bench.engine_model import LIKE_SEED, written_model
from tests.bench.engine_sides import MESH, STOCK, Setup, Side, deployment
from tests.bench.link_shaper import Way

DELAYS_MS = (0, 5, 10, 20, 30)
NODES = (3, 4)
SEED = {(3, 0): 60.2, (3, 5): 30.1, (3, 10): 21.4, (3, 20): 12.6}
TOKENS = 32

Figures = dict[tuple[int, int, str], list[float]]


def tell_latency(run: Run) -> str:
    model = written_model(LIKE_SEED, run.models)
    round_trips_ms = sorted({*DELAYS_MS, *(2 * delay for delay in DELAYS_MS)})
    found: Figures = {}
    for _ in range(run.rounds):
        for nodes in NODES:
            for rtt_ms in round_trips_ms:
                setup = Setup(model, LIKE_SEED.layers, nodes - 1, Way(rtt_ms / 2e3))
                for side in run.sides:
                    speed = _speed(side, setup)
                    found.setdefault((nodes, rtt_ms, side.name), []).append(speed)
                    run.say(f"latency, {nodes} nodes, RTT {rtt_ms} ms, {side.name}: {speed:.1f}")
    return "\n".join(_table(found))


def _speed(side: Side, setup: Setup) -> float:
    with deployment(side, setup) as deployed:
        return tokens_per_s(deployed, TOKENS).figure


def _table(found: Figures) -> list[str]:
    lines = [
        f"Tokens a second by delay, over {TOKENS} tokens, all layers on the workers "
        f"({LIKE_SEED.describe()}):",
        "",
        "| nodes | ms | the seed | stock, ms = RTT | ours, ms = RTT "
        "| stock, ms one way | ours, ms one way |",
        "|---|---|---|---|---|---|---|",
    ]
    for nodes in NODES:
        for delay in DELAYS_MS:
            cells = [
                _cell(found.get((nodes, rtt_ms, name)))
                for rtt_ms in (delay, 2 * delay)
                for name in (STOCK, MESH)
            ]
            seed = SEED.get((nodes, delay))
            lines.append(f"| {nodes} | {delay} | {seed or '–'} | {' | '.join(cells)} |")
    return lines


def _cell(speeds: list[float] | None) -> str:
    return f"{median(speeds):.1f}" if speeds else "–"


LATENCY = Chapter("latency", "the seed's table: 3 and 4 nodes, 0 to 30 ms", tell_latency)
