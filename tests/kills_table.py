"""`./just kills`: the whole table of kills, many times over; with --write, its figures in docs/."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import trio

from tests.kills import TABLE, Kill, Outcome, make_kill_model, run_case, tokens_alone
from tests.sansio import ROOT

RESULTS = ROOT / "docs" / "kills.md"
HEADER = """\
# Kills survived

Written by `./just kills {times} --write`. A worker and an orchestrator on one machine; kill -9 at a
named point ([the list](../meshnode/crash_points.py)), then the victim is started again. Survived:
no orphan process, no leftover, state that reads, the same tokens as alone, by itself.

| point | killed | kills | survived | seconds to recover: median | max | lease freed: max |
|---|---|---:|---:|---:|---:|---:|
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="./just kills")
    parser.add_argument("times", nargs="?", type=int, default=3, help="rounds of the whole table")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mesh-kills-") as folder:
        outcomes = trio.run(run_table, Path(folder), options.times)
    text = HEADER.format(times=options.times) + "".join(
        row(kill, outcomes[kill], options.times) for kill in TABLE
    )
    survived = sum(map(len, outcomes.values()))
    total = options.times * len(TABLE)
    text += f"\n{survived} of {total} kills survived.\n"
    print(text)
    if options.write:
        RESULTS.write_text(text, encoding="utf-8")
    return 0 if survived == total else 1


async def run_table(folder: Path, times: int) -> dict[Kill, list[Outcome]]:
    """What survived, by kill."""
    model = make_kill_model(folder)
    expected = await tokens_alone(folder, model)
    outcomes: dict[Kill, list[Outcome]] = defaultdict(list)
    for number in range(times):
        for index, kill in enumerate(TABLE):
            case = folder / f"{number}-{index}"
            case.mkdir()
            began_s = time.monotonic()
            try:
                outcomes[kill].append(await run_case(kill, case, model, expected))
                word = "survived"
            except Exception as error:
                word = f"FAILED: {_words(error)}"
            took_s = time.monotonic() - began_s
            print(f"{number + 1}/{times} {kill}: {word} ({took_s:.1f} s)", file=sys.stderr)
    return outcomes


def _words(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(map(_words, error.exceptions))
    return f"{type(error).__name__}: {error}"


def row(kill: Kill, outcomes: list[Outcome], times: int) -> str:
    recovered = [outcome.recovered_s for outcome in outcomes] or [float("nan")]
    freed = [outcome.freed_s for outcome in outcomes if outcome.freed_s is not None]
    return (
        f"| {kill.point} | {kill.victim.value} | {times} | {len(outcomes)} "
        f"| {statistics.median(recovered):.1f} | {max(recovered):.1f} "
        f"| {f'{max(freed):.2f}' if freed else ''} |\n"
    )


if __name__ == "__main__":
    sys.exit(main())
