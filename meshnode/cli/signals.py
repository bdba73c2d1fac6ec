"""A program in the foreground: it runs until it ends by itself or is told to stop."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

import trio

from meshnode.nurseries import bare_nursery


async def run_until_signal(*tasks: Callable[[], Awaitable[object]]) -> None:
    """Runs all tasks; SIGINT, SIGTERM, SIGHUP and the first of them to return end all of them.
    That is no failure: the exit code is 0."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with bare_nursery() as nursery:

            async def end_with(task: Callable[[], Awaitable[object]]) -> None:
                await task()
                nursery.cancel_scope.cancel()

            for task in tasks:
                nursery.start_soon(end_with, task)
            await anext(signals)
            nursery.cancel_scope.cancel()
