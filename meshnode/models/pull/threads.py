"""Blocking work on one connection, in a thread that nobody leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import trio

T = TypeVar("T")

MAX_THREADS = 64
_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("pull threads")


class Interruptible(Protocol):
    def hang_up(self) -> None:
        """Ends what is waited for, whichever thread waits."""


async def in_thread(
    connection: Interruptible, work: Callable[[], T], threads: trio.CapacityLimiter | None = None
) -> T:
    """Runs `work`, which waits for nothing but `connection` and a disk. Who is cancelled hangs up
    and waits until the thread has ended: nothing is written for somebody who is gone. `threads`:
    other ones than those of pulls."""
    is_over = False

    async def hang_up_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if not is_over:
                connection.hang_up()

    outcome: list[T] = []
    failures: list[Exception] = []

    async def run() -> None:
        nonlocal is_over
        try:
            outcome.append(await trio.to_thread.run_sync(work, limiter=threads or limiter()))
        except Exception as error:
            failures.append(error)
        is_over = True
        nursery.cancel_scope.cancel()

    # Not in this task: a Ctrl-C reaches the main one alone, and none that waits for a thread.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hang_up_when_cancelled)
        nursery.start_soon(run)
    # Who was cancelled does not get here: that it failed then is because we hung up.
    if failures:
        raise failures[0]
    return outcome[0]


def limiter() -> trio.CapacityLimiter:
    """Threads of pulls are few, and none that the rest of the node waits for."""
    try:
        return _limiter.get()
    except LookupError:
        made = trio.CapacityLimiter(MAX_THREADS)
        _limiter.set(made)
        return made
