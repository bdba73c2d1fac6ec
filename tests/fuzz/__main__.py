"""Fuzz every parser of bytes from outside: `./just fuzz`.

Each runs in a process of its own, with its memory limited; findings are kept under
`tests/fuzz/regressions`, and `--write` puts the table into docs/fuzzing.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable
from dataclasses import asdict
from multiprocessing.pool import Pool
from typing import Any

from tests.fuzz.one import HERE, Row, run_one
from tests.fuzz.table import PARSERS

INPUTS = 1_000_000
RECORD = HERE / "results.json"
PAGE = HERE.parent.parent / "docs/fuzzing.md"
START, END = "<!-- table: ./just fuzz --write -->\n", "<!-- end of the table -->"


def main() -> int:
    arguments = argparse.ArgumentParser(prog="just fuzz", description=__doc__)
    arguments.add_argument("names", nargs="*", help="parsers, by a part of their names; all")
    arguments.add_argument("--inputs", type=int, default=INPUTS)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--jobs", type=int, default=1)
    arguments.add_argument("--write", action="store_true", help="write docs/fuzzing.md")
    arguments.add_argument("--missing", action="store_true", help="only those not in the table")
    given = arguments.parse_args()
    there = _record() if given.missing else {}
    chosen = [
        name
        for name in PARSERS
        if name not in there and (not given.names or any(part in name for part in given.names))
    ]
    rows = []
    # A fresh process each: what one leaves in memory is not counted against the next.
    with multiprocessing.get_context("spawn").Pool(given.jobs, maxtasksperchild=1) as pool:
        for row in _run_all(pool, chosen, given.inputs, given.seed):
            rows.append(row)
            print(_line(row), flush=True)
            if given.write:
                _write([row])
    return 1 if any(row.findings for row in rows) else 0


def _run_all(pool: Pool, names: Iterable[str], inputs: int, seed: int) -> Iterable[Row]:
    return pool.imap_unordered(run_one, [(name, inputs, seed) for name in names], chunksize=1)


def _line(row: Row) -> str:
    return (
        f"{row.name:28} {row.inputs:>9,} inputs  {row.seconds:7.1f} s  {row.accepted:6.1%} accepted"
        f"  worst {row.worst_ms:8.2f} ms {row.worst_kib:6} KiB  {row.findings} findings"
    )


def _record() -> dict[str, Any]:
    return dict(json.loads(RECORD.read_text())) if RECORD.exists() else {}


def _write(rows: Iterable[Row]) -> None:
    """Enters rows into the record, and the record into the page."""
    known = _record() | {row.name: asdict(row) for row in rows}
    known = {name: known[name] for name in PARSERS if name in known}
    RECORD.write_text(json.dumps(known, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + START + _table(Row(**row) for row in known.values()) + END + after)


def _table(rows: Iterable[Row]) -> str:
    lines = [
        "| parser | may raise | inputs | s | accepted | worst input | its memory | findings "
        "| run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.declares} | {row.inputs:,} | {row.seconds:.0f} | {row.accepted:.1%} "
        f"| {row.worst_ms:.2f} ms | {row.worst_kib:,} KiB | {row.findings} "
        f"| {row.date}, Python {row.python} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
