"""Run all tests; fail if a sans-IO module has a line or a branch that none of them takes.

Only those modules are traced, so nothing else is slowed down.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.sansio import ROOT, sans_io_modules


def main() -> int:
    include = ",".join(str(ROOT / module) for module in sans_io_modules())
    with tempfile.TemporaryDirectory(prefix="mesh-coverage-") as scratch:
        environment = {**os.environ, "COVERAGE_FILE": str(Path(scratch) / "data")}
        coverage = [sys.executable, "-m", "coverage"]
        pytest = [*coverage, "run", "--branch", f"--include={include}", "-m", "pytest"]
        report = [*coverage, "report", "--show-missing", "--skip-covered", "--fail-under=100"]
        tests = subprocess.run(pytest, cwd=ROOT, env=environment, check=False)
        covered = subprocess.run(report, cwd=ROOT, env=environment, check=False)
    if covered.returncode != 0:
        print("a sans-IO module is not covered whole: see the lines above", file=sys.stderr)
    return tests.returncode or covered.returncode


if __name__ == "__main__":
    sys.exit(main())
