"""`mesh demo`: the main job, on one machine, from nothing."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click
import psutil
import trio

from meshnode.cli.engine import ensure_engine, fetch_option
from meshnode.cli.settings import DEFAULT_HTTP
from meshnode.cli.signals import run_until_signal
from meshnode.demo.run import run_demo, stay, summary
from meshnode.engine.cache import cache_dir
from meshnode.errors import HomeError

STOP_TIMEOUT_S = 30.0


@click.command()
@click.option("--stay", "keep", is_flag=True, help="Stay up on --http until stopped.")
@click.option("--stop", is_flag=True, help="Stop the demo that stays up.")
@click.option("--http", default=DEFAULT_HTTP, help="HOST:PORT, with --stay.")
@fetch_option
def demo(keep: bool, stop: bool, http: str, offline: bool) -> int:
    """Answer a question with the demo model's layers on two nodes."""
    if stop:
        _stop()
        return 0
    if keep:
        _stay(http, offline=offline)
        return 0
    ensure_engine(offline=offline)
    outcome = trio.run(run_demo, click.echo, _echo_part)
    click.echo("\n" + summary(outcome))
    return 0 if outcome.ok else 1


def _echo_part(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _stay(http: str, *, offline: bool) -> None:
    if _recorded_process() is not None:
        raise HomeError("the demo is up already: `./just stop` ends it")
    ensure_engine(offline=offline)
    record = _record_path()
    record.parent.mkdir(parents=True, exist_ok=True)
    own = psutil.Process()
    own_record = f"{own.pid} {own.create_time()}\n"
    record.write_text(own_record)
    try:
        trio.run(run_until_signal, lambda: stay(http, click.echo))
    finally:
        if _read_record() == own_record:
            record.unlink(missing_ok=True)


def _stop() -> None:
    process = _recorded_process()
    if process is None:
        _record_path().unlink(missing_ok=True)
        raise HomeError("no demo is running: `./just local` starts one")
    try:
        os.kill(process.pid, signal.SIGTERM)
        process.wait(STOP_TIMEOUT_S)
    except ProcessLookupError:
        return  # it ended by itself meanwhile
    except psutil.TimeoutExpired:
        raise HomeError(f"the demo did not stop in {STOP_TIMEOUT_S:.0f} s; try again") from None


def _recorded_process() -> psutil.Process | None:
    """The process that wrote the record, while it lives."""
    try:
        pid_text, created_text = _read_record().split()
        process = psutil.Process(int(pid_text))
        return process if process.create_time() == float(created_text) else None
    except (ValueError, psutil.NoSuchProcess):
        return None


def _read_record() -> str:
    try:
        return _record_path().read_text()
    except OSError:
        return ""


def _record_path() -> Path:
    return cache_dir() / "demo.pid"
