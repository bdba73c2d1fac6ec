"""`mesh doctor`: is this machine fit for a node, one line a check."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import click

from meshnode.cli.settings import home_option
from meshnode.config import human_bytes
from meshnode.engine.build import find_built
from meshnode.engine.cache import engine_cache_dir
from meshnode.engine.sandbox.check import WORDS, Measure, Sandbox, rehearse
from meshnode.errors import MeshError
from meshnode.state import default_home

LOW_DISK_BYTES = 2 << 30
"""Building the engine takes 700 MB; logs and pulled layers come on top."""
LOW_OPEN_FILES = 1024
"""What a node with a few dozen peers, each with several streams, may need."""


class Verdict(StrEnum):
    OK = "ok"
    NOTE = "note"  # it works, with less
    BAD = "bad"  # it will not work, or not as it should


@dataclass(frozen=True)
class Check:
    """`text`: what was found, and what to do where that is not well."""

    name: str
    verdict: Verdict
    text: str


@click.command()
@home_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def doctor(home: Path | None, as_json: bool) -> int:
    """Say whether this machine is fit for a node: engine, sandbox, home, limits.

    Exit code 1 when a check is bad.
    """
    checks = list(examine(home or default_home()))
    if as_json:
        click.echo(json.dumps({"checks": [asdict(check) for check in checks]}))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            click.echo(f"{check.verdict:<5} {check.name:<{width}}  {check.text}")
    return 1 if any(check.verdict is Verdict.BAD for check in checks) else 0


def examine(home: Path) -> Iterator[Check]:
    """Every check, in the order they are shown. Blocks for about 50 ms. Changes nothing."""
    yield _engine()
    yield from _sandbox(Sandbox(*rehearse()))
    yield _home(home)
    yield _disk("disk of the home", home)
    yield _disk("disk of the engine", engine_cache_dir())
    yield _open_files()


def _engine() -> Check:
    try:
        engine = find_built()
    except MeshError as error:
        return Check("engine", Verdict.BAD, str(error))
    if engine is None:
        text = "none is built for this version: the first start builds it, or `mesh engine build`"
        return Check("engine", Verdict.NOTE, text)
    return Check("engine", Verdict.OK, f"{engine.key} ({engine.backend}) in {engine.bin_dir}")


def _sandbox(sandbox: Sandbox) -> Iterator[Check]:
    verdict = Verdict.OK if sandbox.is_full else Verdict.NOTE
    yield Check("sandbox", verdict, sandbox.describe())
    for measure in sandbox.measures:
        yield _measure(measure)


def _measure(measure: Measure) -> Check:
    name = f"sandbox: {WORDS[measure.name]}"
    if not measure.stands or measure.gap:
        return Check(name, Verdict.NOTE, measure.gap or measure.text)
    return Check(name, Verdict.OK, measure.text)


def _home(home: Path) -> Check:
    name = "home"
    try:
        found = home.stat()
    except FileNotFoundError:
        return Check(name, Verdict.OK, f"{home} is not there yet: the first start makes it")
    except OSError as error:
        return Check(name, Verdict.BAD, f"{home} cannot be looked at: {error.strerror}")
    if not stat.S_ISDIR(found.st_mode):
        return Check(name, Verdict.BAD, f"{home} is no folder: name another one with --home")
    if found.st_uid != os.getuid():
        return Check(name, Verdict.BAD, f"{home} belongs to somebody else: name one of yours")
    if found.st_mode & 0o077:
        text = f"{home} is open to other users: chmod 700 it (the next start does)"
        return Check(name, Verdict.BAD, text)
    keys = (path for path in home.glob("*.key") if path.is_file())
    loose = sorted(path.name for path in keys if path.stat().st_mode & 0o077)
    if loose:
        return Check(name, Verdict.BAD, f"{', '.join(loose)} in {home}: chmod 600, others can read")
    return Check(name, Verdict.OK, f"{home}, closed to other users")


def _disk(name: str, folder: Path) -> Check:
    absolute = folder.absolute()
    place = next(each for each in (absolute, *absolute.parents) if os.path.exists(each))
    free_bytes = shutil.disk_usage(place).free
    text = f"{human_bytes(free_bytes)} free at {place}"
    if free_bytes < LOW_DISK_BYTES:
        return Check(name, Verdict.NOTE, f"{text}: less than {human_bytes(LOW_DISK_BYTES)}")
    return Check(name, Verdict.OK, text)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < LOW_OPEN_FILES and soft != resource.RLIM_INFINITY:
        text = f"{soft} at once: raise it with `ulimit -n {min(hard, 4096)}`"
        return Check("open files", Verdict.NOTE, text)
    return Check("open files", Verdict.OK, f"{soft} at once")
