"""The one place where asyncio lives: a thread with a loop of its own, for aiortc.

Neither side waits for the other. Each leaves calls for the other (`call` towards the island, `tell`
back), and wakes it once for all that were left meanwhile: a wake-up costs a system call. What they
hold in flight is bounded by whoever leaves them (webrtc.py: bytes written and not yet sent, bytes
arrived and not yet taken).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar, TypeVarTuple

import trio

from tunnels.errors import LinkClosed

GOODBYE_S = 1.5  # for what was spawned as a goodbye, before the loop ends
GIVE_UP_S = 2.0  # for a coroutine that was cancelled to be over

Result = TypeVar("Result")
Given = TypeVarTuple("Given")

log = logging.getLogger(__name__)


class Island:
    """I run coroutines for aiortc, from the first one on until my nursery ends.

    Methods are for trio's thread, unless they say that they are for the island's. at_end: called
    there when the nursery has ended; what they spawn as goodbyes is waited for.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._over = False
        self._starting = trio.Lock()
        self.at_end: set[Callable[[], object]] = set()
        self._takes_tasks = True
        self._goodbyes: set[asyncio.Task[Any]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._for_island: deque[Callable[[], object]] = deque()
        self._island_is_called = False
        self._for_trio: deque[Callable[[], object]] = deque()
        self._trio_is_called = False

    @property
    def stands(self) -> bool:
        return self._loop is not None and not self._over

    async def run(
        self, function: Callable[[*Given], Coroutine[Any, Any, Result]], *args: *Given
    ) -> Result:
        """`await function(*args)`, there. Cancelled here, it is cancelled there, and over.

        Raises LinkClosed when the island ends first.
        """
        await self._start()
        visit: _Visit[Result] = _Visit(self)
        self.call(lambda: visit.begin(function(*args)))
        try:
            await visit.over.wait()
        except trio.Cancelled:
            self.call(visit.cancel)
            with trio.move_on_after(GIVE_UP_S, shield=True):
                await visit.over.wait()
            raise
        return visit.result()

    def call(self, function: Callable[[], object]) -> None:
        """Call it there, soon. Never waits; nothing happens once the island is over."""
        self._for_island.append(function)
        if not self._island_is_called and self._loop is not None and not self._over:
            self._island_is_called = True
            try:
                self._loop.call_soon_threadsafe(self._do_calls)
            except RuntimeError:  # it has closed this very moment
                self._over = True

    # --- for the island's thread --------------------------------------------------------

    def tell(self, function: Callable[[], object]) -> None:
        """Call it in trio's thread, soon. Never waits."""
        self._for_trio.append(function)
        if not self._trio_is_called:
            self._trio_is_called = True
            try:
                self._token.run_sync_soon(self._hear_calls)
            except trio.RunFinishedError:
                self._for_trio.clear()

    def spawn(self, coroutine: Coroutine[Any, Any, object], *, is_goodbye: bool = False) -> None:
        """A task of its own; the island waits for a goodbye before it ends, GOODBYE_S at most."""
        if not self._takes_tasks:
            coroutine.close()
            return
        task = asyncio.get_running_loop().create_task(coroutine)
        kept = self._goodbyes if is_goodbye else self._tasks
        kept.add(task)
        task.add_done_callback(kept.discard)
        task.add_done_callback(_log_failure)

    @staticmethod
    def event() -> asyncio.Event:
        return asyncio.Event()

    @staticmethod
    async def at_most(seconds: float, coroutine: Coroutine[Any, Any, object]) -> bool:
        """Whether it came to its end in that time."""
        try:
            async with asyncio.timeout(seconds):
                await coroutine
        except TimeoutError:
            return False
        return True

    def _do_calls(self) -> None:
        self._island_is_called = False
        _do_all(self._for_island)

    async def _live(
        self, ready: Callable[[asyncio.AbstractEventLoop, asyncio.Event], None]
    ) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        loop.set_exception_handler(_quietly)
        ready(loop, stop)
        await stop.wait()
        self._do_calls()
        for say_goodbye in list(self.at_end):
            say_goodbye()
        if self._goodbyes:
            await asyncio.wait(set(self._goodbyes), timeout=GOODBYE_S)
        self._takes_tasks = False

    # --- the thread ---------------------------------------------------------------------

    async def _start(self) -> None:
        async with self._starting:
            if self._over:
                raise LinkClosed("this node has stopped")
            if self._loop is None:
                await self._nursery.start(self._keep)

    async def _keep(self, task_status: trio.TaskStatus[None]) -> None:
        begun, ended = trio.Event(), trio.Event()

        def ready(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
            self._loop, self._stop = loop, stop
            self.tell(begun.set)

        def live() -> None:
            try:
                with asyncio.Runner() as runner:
                    runner.run(self._live(ready))
            finally:
                self._over = True
                self.tell(ended.set)

        thread = threading.Thread(target=live, name="asyncio island", daemon=True)
        thread.start()
        try:
            await begun.wait()
            task_status.started()
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(GOODBYE_S + GIVE_UP_S, shield=True):
                await begun.wait()
                self.call(self._end)
                await ended.wait()
                thread.join(GIVE_UP_S)  # telling that was its last act
            self._over = True

    def _end(self) -> None:
        assert self._stop is not None
        self._stop.set()

    def _hear_calls(self) -> None:
        self._trio_is_called = False
        _do_all(self._for_trio)


class _Visit(Generic[Result]):
    """One coroutine of the island that somebody in trio awaits."""

    def __init__(self, island: Island) -> None:
        self.over = trio.Event()
        self._island = island
        self._task: asyncio.Task[Result] | None = None
        self._result: Result | None = None
        self._error: BaseException | None = None

    def begin(self, coroutine: Coroutine[Any, Any, Result]) -> None:
        self._task = asyncio.get_running_loop().create_task(coroutine)
        self._task.add_done_callback(self._ended)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def result(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def _ended(self, task: asyncio.Task[Result]) -> None:
        if task.cancelled():
            self._error = LinkClosed("this node has stopped")
        elif (error := task.exception()) is not None:
            self._error = error
        else:
            self._result = task.result()
        self._island.tell(self.over.set)


def _do_all(calls: deque[Callable[[], object]]) -> None:
    while calls:
        try:
            calls.popleft()()
        except Exception:
            log.exception("a call between trio and asyncio failed")


def _quietly(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A stranger's datagram must not fill a log."""
    log.debug("on the island: %s", context.get("message"), exc_info=context.get("exception"))


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("a task of the island failed: %s", type(error).__name__, exc_info=error)
