"""One stream carried to and from one local socket, until both directions have ended.

Two ways: by the event loop, over whatever channel is up; and by a thread (ride.py), as long as the
channel is a connection that can be lent to it. What was taken from one side and not yet given to
the other is kept here, so that the two can take turns at any moment.
"""

from __future__ import annotations

import logging
import socket as stdlib_socket
import time

import trio

from tunnels.frames import RecordDecoder
from tunnels.link import Channel, Wire
from tunnels.ride import CAN_RIDE, Ride
from tunnels.stream import ASK_AGAIN_S, Stream

CHUNK_BYTES = 256 << 10
MAX_RIDES = 128  # threads in this process; streams beyond are carried by the event loop

log = logging.getLogger(__name__)
_seats = trio.CapacityLimiter(MAX_RIDES)


class Splice:
    """I own both ends while `run` lasts; the caller closes them after that."""

    def __init__(self, stream: Stream, local: trio.socket.SocketType) -> None:
        self._stream = stream
        self._local = local
        self._undelivered = b""
        self._up_ended = False
        self._down_ended = False
        self._failure: OSError | None = None  # of the local socket, in a thread
        self._over = False
        self._ride: Ride | None = None
        self._copying: trio.CancelScope | None = None
        self._turn = trio.Lock()
        self._parked = trio.Event()
        self._ridden = trio.Event()
        self._ridden.set()

    async def run(self) -> None:
        """Raises StreamError, OSError."""
        self._stream.board(self)
        try:
            while not (self._up_ended and self._down_ended):
                await self._copy()
                self._parked.set()
                await self._ridden.wait()
                self._parked = trio.Event()
                if self._failure is not None:
                    raise self._failure
        finally:
            self._over = True
            self._parked.set()
            self._stream.disembark()
            with trio.CancelScope(shield=True):
                await self._ridden.wait()

    # --- the event loop's way -----------------------------------------------------------

    async def _copy(self) -> None:
        """Until both directions have ended, or a ride begins."""
        if not self._ridden.is_set():
            return
        async with trio.open_nursery() as nursery:
            self._copying = nursery.cancel_scope
            nursery.start_soon(self._copy_up)
            await self._copy_down()
        self._copying = None

    async def _copy_up(self) -> None:
        while not self._up_ended:
            await self._stream.wait_send_all_might_not_block()
            data = await self._local.recv(min(self._stream.sendable_bytes, CHUNK_BYTES))
            if data:
                self._stream.send_now(data)
            else:
                self._up_ended = True
                self._stream.end_now()

    async def _copy_down(self) -> None:
        while not self._down_ended:
            if not self._undelivered:
                self._undelivered = await self._stream.receive_some(CHUNK_BYTES)
            if not self._undelivered:
                self._down_ended = True
                self._local.shutdown(stdlib_socket.SHUT_WR)
            while self._undelivered:
                sent = await self._local.send(self._undelivered)
                self._undelivered = self._undelivered[sent:]

    # --- the thread's way ---------------------------------------------------------------

    async def ride(self, channel: Channel, decoder: RecordDecoder) -> bool:
        """Carry the stream by thread over `channel`, whose bytes nobody else reads meanwhile;
        False when that cannot be. Returns when it is over. Raises LinkClosed, BadFrame."""
        if not (CAN_RIDE and channel.can_lend and self._is_under_way):
            return False
        seat = object()
        try:
            _seats.acquire_on_behalf_of_nowait(seat)
        except trio.WouldBlock:
            return False
        try:
            return await self._ride_in_turn(channel, decoder)
        finally:
            _seats.release_on_behalf_of(seat)

    @property
    def _is_under_way(self) -> bool:
        """Not so when the event loop's way is the one that will find out about the end."""
        state = self._stream.state
        failed = self._failure is not None or state.failure is not None or state.stopped_by_peer
        return not (self._over or failed or (self._up_ended and self._down_ended))

    async def _ride_in_turn(self, channel: Channel, decoder: RecordDecoder) -> bool:
        async with self._turn:  # the ride on the channel before may not be over yet
            self._ridden = trio.Event()
            try:
                if self._copying is not None:
                    self._copying.cancel()
                await self._parked.wait()
                wire = await channel.lend(self._wake)
                if wire is None:
                    return False
                try:
                    if not self._is_under_way or self._stream.channel is not channel:
                        return True
                    return await self._ride_on(channel, wire, decoder)
                finally:
                    wire.give_back()
            finally:
                self._ridden.set()

    async def _ride_on(self, channel: Channel, wire: Wire, decoder: RecordDecoder) -> bool:
        token = trio.lowlevel.current_trio_token()

        def settle(spent_s: float, carried: int) -> None:
            token.run_sync_soon(self._settle, channel, spent_s, carried, ride.heard_at_s)

        state, ended = self._stream.state, (self._up_ended, self._down_ended)
        local = stdlib_socket.socket(fileno=self._local.fileno())
        try:
            ride = Ride(state, decoder, wire, local, self._undelivered, ended, settle)
        except OSError as error:
            local.detach()
            log.warning("a stream is carried without a thread: %s", error.strerror)
            return False
        self._undelivered = b""
        try:
            await self._run(ride)
        finally:
            local.detach()
        if isinstance(ride.failure, OSError):
            self._failure = ride.failure
        elif ride.failure is not None:
            raise ride.failure
        return True

    async def _run(self, ride: Ride) -> None:
        """The thread, which ends when we are cancelled."""
        self._ride = ride
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._halt_when_cancelled)
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(ride.run, limiter=trio.CapacityLimiter(1))
                nursery.cancel_scope.cancel()
        finally:
            self.halt()
            self._ride = None
            ride.close()
            self._up_ended, self._down_ended = ride.up_ended, ride.down_ended

    async def _halt_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.halt()

    def halt(self) -> None:
        """The stream's state is the event loop's again, now."""
        if self._ride is not None:
            self._undelivered += self._ride.halt()

    def _wake(self) -> None:
        if self._ride is not None:
            self._ride.wake()

    def _settle(self, channel: Channel, spent_s: float, carried: int, heard_at_s: float) -> None:
        """What a ride has spent is the link's to pay."""
        share, now = channel.share, trio.current_time()
        channel.heard(time.monotonic() - heard_at_s)
        share.earn(carried)
        share.charge(spent_s, now)
        if share.wait_s(now) and self._ride is not None and not self._ride.held:
            self._ride.held = True
            trio.lowlevel.spawn_system_task(self._hold, channel, self._ride)

    async def _hold(self, channel: Channel, ride: Ride) -> None:
        while self._ride is ride and (  # noqa: ASYNC110 - no event
            wait_s := channel.share.wait_s(trio.current_time())
        ):
            await trio.sleep(min(wait_s, ASK_AGAIN_S))
        ride.held = False
        ride.wake()
