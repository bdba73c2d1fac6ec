"""How far long work is, and how long it will go on, for who watches it or reads it later."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from meshnode.models.forecast import Forecast, Outlook

LINE_AT_SHARE = 0.1
LINE_AT_S = 10.0
LEAST_BETWEEN_S = 2.0
MAX_BETWEEN_S = 60.0

OnProgress = Callable[[int, int], None]


@contextmanager
def shown_bytes(what: str, *, quiet: bool) -> Iterator[OnProgress | None]:
    """Gives a function for bytes done and in all: a bar on a terminal, elsewhere a line now and
    then. None where nobody is to see it."""
    if quiet or sys.stderr is None:
        yield None
        return
    if not sys.stderr.isatty():
        yield Lines(what, lambda line: click.echo(line, err=True)).tell
        return
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.fields[outlook]}"))
    forecast = Forecast()
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None, outlook="")

        def tell(done_bytes: int, total_bytes: int) -> None:
            outlook = forecast.take(done_bytes, total_bytes, time.monotonic())
            shown.update(task, completed=done_bytes, total=total_bytes, outlook=str(outlook))

        yield tell


class Lines:
    """I say how far it is at each tenth, or after ten seconds; less often what takes hours, and
    nothing of what is soon over."""

    def __init__(
        self, what: str, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what = what
        self._write = write
        self._clock = clock
        self._forecast = Forecast()
        self._began_s = self._told_s = clock()
        self._told: Outlook | None = None

    def tell(self, done_bytes: int, total_bytes: int) -> None:
        now = self._clock()
        outlook = self._forecast.take(done_bytes, total_bytes, now)
        if self._is_due(outlook, now):
            self._told, self._told_s = outlook, now
            self._write(f"{self._what}: {outlook}")

    def _is_due(self, outlook: Outlook, now: float) -> bool:
        between_s = now - self._told_s
        often_s = min(max(LINE_AT_S, (now - self._began_s) / 20), MAX_BETWEEN_S)
        if between_s >= often_s:
            return True
        told_bytes = self._told.done_bytes if self._told else 0
        further_bytes = outlook.done_bytes - told_bytes
        return between_s >= LEAST_BETWEEN_S and further_bytes > outlook.total_bytes * LINE_AT_SHARE
