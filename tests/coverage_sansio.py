"""Run all tests; fail if a sans-IO module has a line or a branch that none of them takes.

Two rows at a time: whole nodes and networks wait most of the time, the rest computes. Only those
modules are traced, so nothing else is slowed down.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.sansio import ROOT, sans_io_modules

WAITING = ("tests/e2e", "tests/netlab")
ROWS = {
    "whole nodes and networks": WAITING,
    "the rest": ("tests", *(f"--ignore={folder}" for folder in WAITING)),
}


def main() -> int:
    include = ",".join(str(ROOT / module) for module in sans_io_modules())
    with tempfile.TemporaryDirectory(prefix="mesh-coverage-") as name:
        scratch = Path(name)
        environment = {**os.environ, "COVERAGE_FILE": str(scratch / "data")}
        coverage = [sys.executable, "-m", "coverage"]
        pytest = [*coverage, "run", "-p", "--branch", f"--include={include}", "-m", "pytest"]
        logs = [scratch / f"{number}.log" for number in range(len(ROWS))]
        rows = [
            subprocess.Popen(
                [*pytest, *selection],
                cwd=ROOT,
                env=environment,
                stdout=log.open("wb"),
                stderr=subprocess.STDOUT,
            )
            for selection, log in zip(ROWS.values(), logs, strict=True)
        ]
        failed = 0
        for title, process, log in zip(ROWS, rows, logs, strict=True):
            print(f"--- {title}", flush=True)
            failed = _follow(process, log) or failed
        report = [*coverage, "report", "--show-missing", "--skip-covered", "--fail-under=100"]
        for command in ([*coverage, "combine", "-q"], report):
            covered = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if covered.returncode != 0:
        print("a sans-IO module is not covered whole: see the lines above", file=sys.stderr)
    return failed or covered.returncode


def _follow(process: subprocess.Popen[bytes], log: Path) -> int:
    """Show what it says as it comes; its exit status."""
    with log.open("rb") as lines:
        while True:
            is_over = process.poll() is not None
            if said := lines.read():
                sys.stdout.buffer.write(said)
                sys.stdout.flush()
            elif is_over:
                return process.returncode
            else:
                try:
                    process.wait(1)
                except subprocess.TimeoutExpired:
                    continue


if __name__ == "__main__":
    sys.exit(main())
