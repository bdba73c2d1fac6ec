"""`./just gossip`: how a mesh's gossip grows with the mesh, with the core of the real nodes.

Each size is run for MEASURED_S of the crowd's own clock, all records being refreshed as often as in
a real mesh; then one node changes its record, and a newcomer joins that knows one member.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from meshnode.own_record import REFRESH_S, REFRESH_S_A_MEMBER
from tests.bench.plot import Chart, svg
from tests.lab.crowd import CALM_BYTES_PER_S, RECORD_BYTES, STREAM_BYTES, Crowd

DOCS = Path(__file__).parents[2] / "docs"
RECORD, PLOT = DOCS / "roster.json", DOCS / "roster.svg"
SIZES = (10, 20, 50, 100, 200, 500, 1000)
SETTLE_S = 60.0
MEASURED_S = 600.0
LONGEST_S = 600.0
BUDGET_BYTES_PER_S = 2000.0

Row = dict[str, float]


def measure(size: int, seed: int = 0) -> Row:
    """One size of mesh."""
    crowd = Crowd(size, seed)
    crowd.all_know_all()
    crowd.connect_all()
    crowd.run(SETTLE_S)
    crowd.reset_counters()
    crowd.refresh_all(max(REFRESH_S, REFRESH_S_A_MEMBER * size), MEASURED_S)
    crowd.run(MEASURED_S)
    rates = sorted(crowd.rates(MEASURED_S).values())
    sessions = [crowd.sessions(node) for node in crowd.up()]
    return {
        "nodes": size,
        "sessions_mean": round(sum(sessions) / size, 1),
        "sessions_most": max(sessions),
        "bytes_per_s_median": round(median(rates)),
        "bytes_per_s_most": round(rates[-1]),
        "news_to_half_s": round(_news(crowd, share=0.5), 2),
        "news_to_all_s": round(_news(crowd, share=1.0), 2),
        "newcomer_knows_all_s": round(_newcomer(crowd), 2),
    }


def _news(crowd: Crowd, share: float) -> float:
    """How long after a change so many have it, in seconds."""
    node = crowd.up()[crowd.dice.randrange(len(crowd.up()))]
    number, began_s = crowd.change(node), crowd.now
    wanted = round(share * (len(crowd.up()) - 1))
    crowd.run(LONGEST_S, lambda: crowd.reached(node.peer, number) >= wanted)
    return crowd.now - began_s


def _newcomer(crowd: Crowd) -> float:
    """How long until a node that knew one member knows all. It keeps sessions as any does."""
    newcomer, inviter = crowd.add("newcomer"), crowd.up()[0]
    began_s, everybody = crowd.now, len(crowd.up())
    newcomer.gossip.put(inviter.peer, 1, crowd.now)
    crowd.link(newcomer, inviter)
    for _ in range(round(LONGEST_S)):
        if len(newcomer.gossip) >= everybody:
            break
        crowd.run(1.0, lambda: len(newcomer.gossip) >= everybody)
        crowd.settle(newcomer)
    return crowd.now - began_s


def charts(rows: Sequence[Row]) -> list[Chart]:
    def line(key: str) -> list[tuple[float, float]]:
        return [(row["nodes"], row[key]) for row in rows]

    return [
        Chart(
            "Control traffic of one node, sent and received",
            "nodes",
            "bytes a second",
            {
                "the busiest node": line("bytes_per_s_most"),
                "half of the nodes have less": line("bytes_per_s_median"),
            },
            (10, 20, 50, 100, 200, 500, 1000),
            (100, 200, 500, 1000, 2000, 5000, 10000),
            (BUDGET_BYTES_PER_S, "the budget at 50 nodes"),
        ),
        Chart(
            "How soon something is known",
            "nodes",
            "seconds",
            {
                "a newcomer knows all": line("newcomer_knows_all_s"),
                "all know what is news": line("news_to_all_s"),
                "half of them do": line("news_to_half_s"),
            },
            (10, 20, 50, 100, 200, 500, 1000),
            (0.1, 0.2, 0.5, 1, 2, 5, 10),
        ),
    ]


def figures() -> dict[str, Any]:
    """What is put in, and not measured here."""
    return {
        "record_bytes": RECORD_BYTES,
        "stream_bytes": STREAM_BYTES,
        "calm_session_bytes_per_s": CALM_BYTES_PER_S,
        "measured_s": MEASURED_S,
    }


@click.command()
@click.option("--write", is_flag=True, help="Put the result into docs/roster.json and .svg.")
@click.argument("sizes", nargs=-1, type=click.IntRange(2))
def main(write: bool, sizes: tuple[int, ...]) -> None:
    """Nodes in a mesh, and what each of them sends."""
    rows = []
    for size in sizes or SIZES:
        rows.append(measure(size))
        click.echo(json.dumps(rows[-1]))
    if write:
        RECORD.write_text(json.dumps({"figures": figures(), "rows": rows}, indent=1) + "\n")
        PLOT.write_text(svg(charts(rows)))


if __name__ == "__main__":
    main()
