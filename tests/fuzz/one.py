"""One parser's campaign, in a process of its own, and what is kept of it."""

from __future__ import annotations

import datetime
import hashlib
import logging
import platform
import resource
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.campaign import run_campaign
from tests.fuzz.table import PARSERS, folder_name

MEMORY_LIMIT_BYTES = 4 << 30
HERE = Path(__file__).parent
REGRESSIONS = HERE / "regressions"


@dataclass(frozen=True)
class Row:
    """One parser's line of the table."""

    name: str
    declares: str
    inputs: int
    seconds: float
    accepted: float
    worst_ms: float
    worst_kib: int
    findings: int
    date: str
    python: str


def quiet() -> None:
    """What parsers log and libraries warn of is not the matter here, and costs time."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def run_one(task: tuple[str, int, int]) -> Row:
    name, inputs, seed = task
    quiet()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    parser = PARSERS[name]
    result = run_campaign(parser, inputs, seed)
    for finding in result.findings:
        path = keep(name, finding.data)
        print(f"{name}: {finding.what} ({path})", file=sys.stderr, flush=True)
    return Row(
        name=name,
        declares=parser.declares,
        inputs=result.inputs,
        seconds=round(result.seconds, 1),
        accepted=round(result.accepted / max(1, result.inputs), 4),
        worst_ms=round(result.worst_seconds * 1000, 2),
        worst_kib=result.worst_memory_bytes >> 10,
        findings=len(result.findings),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        python=platform.python_version(),
    )


def keep(name: str, data: bytes) -> Path:
    """A finding as a regression: from now on every test run tries it."""
    folder = REGRESSIONS / folder_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    return path.relative_to(HERE.parent.parent)
