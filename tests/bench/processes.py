"""What benchmarks of tunnels share: processes that answer over a pipe."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import click

LOOPBACK = "127.0.0.1"
MESSAGE = bytes(range(256)) * 40  # 10 KB
READY_TIMEOUT_S = 20.0

spawn = multiprocessing.get_context("spawn")


@contextmanager
def process(main: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=main, args=(theirs, *arguments), daemon=True)
    child.start()
    try:
        yield ours
    finally:
        child.kill()
        child.join()


def said(pipe: Connection) -> Any:
    if not pipe.poll(READY_TIMEOUT_S):
        raise click.ClickException("a process of this benchmark did not start")
    return pipe.recv()


def verdict(
    what: str, ratio: float, *, at_most: float | None = None, at_least: float | None = None
) -> str:
    goal = f"at most {at_most}" if at_least is None else f"at least {at_least}"
    if None not in (at_most, at_least):
        goal = f"{at_least} to {at_most}"
    reached = (at_most is None or ratio <= at_most) and (at_least is None or ratio >= at_least)
    return f"{what}: {ratio:.2f} (to reach: {goal}) {'ok' if reached else 'MISSED'}"
