"""`./just netlab [--tries N] [--named N] [--cells PATTERN …] [--write]`: the matrix, tried."""

from __future__ import annotations

import argparse
import fnmatch
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import trio

from tests.netlab import report
from tests.netlab.expected import CELLS, NAMED, Cell
from tests.netlab.netns import can_be_made
from tests.netlab.seen import Seen, load, save, summed, this_run, times
from tests.netlab.servers import can_run
from tests.netlab.stations import open_stations
from tests.netlab.topology import Internet
from tests.netlab.tries import Try, try_cells


def main() -> int:
    options = _options()
    if not (can_be_made() and can_run("turnserver", "miniupnpd")):
        print(
            "the lab needs root, iproute2, nftables, conntrack, coturn and miniupnpd: "
            "run ./just setup as root"
        )
        return 1
    cells = [
        cell
        for name, cell in CELLS.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.cells)
    ]
    if not cells:
        print("no cell has such a name")
        return 2
    began_s = time.monotonic()
    net = Internet()
    try:
        net.lay()
        seen = trio.run(run, net, cells, options)
    finally:
        net.close()
    bad = [cell.name for cell in cells if not seen.get(cell.name, Seen()).is_good(cell)]
    print(f"{len(cells) - len(bad)} of {len(cells)} cells as expected", end="")
    print(f", in {time.monotonic() - began_s:.0f} s")
    return 1 if bad else 0


async def run(net: Internet, cells: list[Cell], options: argparse.Namespace) -> dict[str, Seen]:
    """Each cell in turn, several at once."""

    def count(cell: Cell) -> int:
        return int(options.named if cell.name in NAMED else options.tries)

    def tell(cell: Cell, tries: list[Try]) -> None:
        seen[cell.name] = summed(cell, tries, name)
        _show(cell, seen[cell.name])
        if options.write:  # as it goes: a whole run takes an hour
            known[cell.name] = seen[cell.name]
            save(known)
            report.write(known)

    known, seen, name = load(), dict[str, Seen](), this_run(options.at_once)
    with tempfile.TemporaryDirectory(prefix="mesh-netlab-") as scratch:
        async with (
            open_stations(net, Path(options.logs or scratch)) as stations,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(_end_when_told, nursery.cancel_scope)
            await try_cells(stations, cells, count, options.at_once, tell)
            nursery.cancel_scope.cancel()
    return seen


async def _end_when_told(scope: trio.CancelScope) -> None:
    """As at the end of all tries: nothing is left behind."""
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


def _show(cell: Cell, one: Seen) -> None:
    mark = "  " if one.is_good(cell) else "!!"
    outcomes = ", ".join(f"{outcome} {count}" for outcome, count in one.outcomes.items())
    print(
        f"{mark} {cell.name:28} {cell.outcome.value:10} seen: {outcomes:24} "
        f"first byte {times(one.first_byte_s):16} direct {times(one.direct_s):16} {one.said[:120]}",
        flush=True,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./just netlab", description=__doc__)
    parser.add_argument("--tries", type=int, default=3, help="in every cell (3)")
    parser.add_argument("--named", type=int, help="in the twelve named cells (100)")
    parser.add_argument("--cells", nargs="+", default=["*"], help="names or patterns; all")
    parser.add_argument("--at-once", type=int, default=2 * (os.cpu_count() or 1))
    parser.add_argument("--write", action="store_true", help="keep results; docs/nat-matrix.md")
    parser.add_argument("--logs", help="keep what each peer logs in this folder")
    options = parser.parse_args()
    if options.named is None:
        options.named = 100 if options.tries == parser.get_default("tries") else options.tries
    return options


if __name__ == "__main__":
    sys.exit(main())
