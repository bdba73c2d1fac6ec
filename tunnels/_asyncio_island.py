"""The one place where asyncio lives: a loop for aiortc, run in trio's thread.

Trio waits and asyncio works: the loop's selector never blocks. It says how long the loop would have
slept and stops it; meanwhile trio watches the descriptor that the selector itself is (epoll and
kqueue can be waited for), the loop's next timer, and the UDP sockets, which are trio's
(docs/decisions/0010).

Code of one side never runs in the middle of the other's: calls for asyncio (`call`) are done when
its loop runs next, calls for trio (`tell`) when the loop has stopped.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar, TypeVarTuple

import trio

from tunnels.binding import Address
from tunnels.errors import LinkClosed
from tunnels.webrtc_udp import DatagramProtocol, DatagramTransport

GOODBYE_S = 1.5  # for what was spawned as a goodbye, before the loop ends
GIVE_UP_S = 2.0  # for a coroutine that was cancelled to be over
ROUNDS = 16  # of the loop, before trio has its turn
STOPPED = "this node has stopped"

Result = TypeVar("Result")
Given = TypeVarTuple("Given")

log = logging.getLogger(__name__)


class Island:
    """I run coroutines for aiortc, from the first one on until my nursery ends.

    at_end: called on the loop when the nursery ends; what they spawn as goodbyes is waited for.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._loop: _Loop | None = None
        self._over = False
        self.at_end: set[Callable[[], object]] = set()
        self._goodbyes: set[asyncio.Task[Any]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._for_island: deque[Callable[[], object]] = deque()
        self._for_trio: deque[Callable[[], object]] = deque()
        self._unsent: list[DatagramTransport] = []
        self._work = trio.lowlevel.ParkingLot()
        self._alarm = trio.CancelScope()
        self._watching = trio.CancelScope(shield=True)

    @property
    def stands(self) -> bool:
        return self._loop is not None and not self._over

    @property
    def is_over(self) -> bool:
        return self._over

    async def run(
        self, function: Callable[[*Given], Coroutine[Any, Any, Result]], *args: *Given
    ) -> Result:
        """`await function(*args)`, there. Cancelled here, it is cancelled there, and over; what it
        returned all the same comes back, and may hold something that wants to be ended.

        Raises LinkClosed when the island ends first.
        """
        self._start()
        visit: _Visit[Result] = _Visit(self)
        self.call(lambda: visit.begin(function(*args)))
        try:
            await visit.over.wait()
        except trio.Cancelled:
            self.call(visit.cancel)
            with trio.move_on_after(GIVE_UP_S, shield=True):
                await visit.over.wait()
            if not visit.has_returned:
                raise
        return visit.result()

    def call(self, function: Callable[[], object]) -> None:
        """Call it on the loop, soon. Nothing happens once the island is over."""
        if not self._over:
            self._for_island.append(function)
            self._work.unpark_all()

    # --- for what runs on the loop ------------------------------------------------------

    def tell(self, function: Callable[[], object]) -> None:
        """Call it as trio's code, soon."""
        self._for_trio.append(function)

    def spawn(self, coroutine: Coroutine[Any, Any, object], *, is_goodbye: bool = False) -> None:
        """A task of its own; the island waits for a goodbye before it ends, GOODBYE_S at most."""
        if self._over:
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

    # --- the loop, kept going by trio ---------------------------------------------------

    def _start(self) -> None:
        if self._over:
            raise LinkClosed(STOPPED)
        if self._loop is None:
            self._loop = _Loop(_Selector(), self._open_socket)
            self._loop.set_exception_handler(_quietly)
            self._nursery.start_soon(self._keep, self._loop)

    async def _keep(self, loop: _Loop) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, loop)
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await self.run(self._leave)
                self._watching.cancel()
        self._step(loop)  # what was called meanwhile is told that it is over
        loop.close()

    async def _watch(self, loop: _Loop) -> None:
        with self._watching:
            async with trio.open_nursery() as nursery:
                self._watchers = nursery
                nursery.start_soon(self._watch_selector, loop)
                nursery.start_soon(self._watch_work, loop)

    async def _watch_selector(self, loop: _Loop) -> None:
        """Sockets that are asyncio's own: TCP's, of TURN."""
        while True:
            await trio.lowlevel.wait_readable(loop.selector)
            loop.selector.is_ready = True
            self._step(loop)

    def _open_socket(self, address: Address, protocol: DatagramProtocol) -> DatagramTransport:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, _Loop)
        transport = DatagramTransport(address, protocol, loop.call_soon, self._unsent.append)
        self._watchers.start_soon(transport.run, functools.partial(self._step, loop))
        return transport

    async def _watch_work(self, loop: _Loop) -> None:
        """Calls, and timers."""
        while True:
            with trio.CancelScope(deadline=loop.due_s) as self._alarm:
                if self._for_island:
                    await trio.lowlevel.checkpoint()
                else:
                    await self._work.park()
            self._step(loop)

    def _step(self, loop: _Loop) -> None:
        if self._for_island:
            loop.call_soon(_do_all, self._for_island)
        loop.run_what_is_ready()
        while self._unsent:
            self._unsent.pop().flush()
        _do_all(self._for_trio)
        if loop.due_s < self._alarm.deadline:
            self._alarm.deadline = loop.due_s

    async def _leave(self) -> None:
        for say_goodbye in list(self.at_end):
            say_goodbye()
        if self._goodbyes:
            await asyncio.wait(set(self._goodbyes), timeout=GOODBYE_S)
        self._over = True
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=GIVE_UP_S)


class _Loop(asyncio.SelectorEventLoop):
    """Its time is trio's. due_s: when it has to run again, though nothing happens."""

    due_s = math.inf

    def __init__(
        self,
        selector: _Selector,
        open_socket: Callable[[Address, DatagramProtocol], DatagramTransport],
    ) -> None:
        super().__init__(selector)
        self.selector = selector
        selector.stop = self.stop
        self._open_socket = open_socket

    async def create_datagram_endpoint(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], Any],
        local_addr: Address | None = None,
        remote_addr: Address | None = None,
        **more: Any,
    ) -> tuple[Any, Any]:
        if local_addr is None or remote_addr is not None:
            return await super().create_datagram_endpoint(
                protocol_factory, local_addr, remote_addr, **more
            )
        protocol = protocol_factory()
        return self._open_socket(local_addr, protocol), protocol

    def time(self) -> float:
        return trio.current_time()

    def run_what_is_ready(self) -> None:
        self.selector.rounds = ROUNDS
        self.run_forever()  # until the selector stops it
        self.due_s = trio.current_time() + self.selector.idle_s


class _Selector(selectors.DefaultSelector):
    """Where the loop would sleep, I stop it."""

    rounds = 0
    is_ready = False  # trio has seen it: to look costs a system call
    idle_s = math.inf  # how long it would have slept
    stop: Callable[[], None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0) if self.is_ready else []
        self.is_ready = bool(found)
        self.rounds -= 1
        is_busy = bool(found) or timeout == 0
        if not is_busy or self.rounds <= 0:
            self.idle_s = 0.0 if is_busy else math.inf if timeout is None else timeout
            self.stop()
        return found


class _Visit(Generic[Result]):
    """One coroutine of the island that somebody in trio awaits."""

    def __init__(self, island: Island) -> None:
        self.over = trio.Event()
        self._island = island
        self._task: asyncio.Task[Result] | None = None
        self._result: Result | None = None
        self._error: BaseException | None = None
        self.has_returned = False

    def begin(self, coroutine: Coroutine[Any, Any, Result]) -> None:
        if self._island.is_over:
            coroutine.close()
            self._fail(LinkClosed(STOPPED))
            return
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
            self._fail(LinkClosed(STOPPED))
        elif (error := task.exception()) is not None:
            self._fail(error)
        else:
            self._result = task.result()
            self.has_returned = True
            self._island.tell(self.over.set)

    def _fail(self, error: BaseException) -> None:
        self._error = error
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
