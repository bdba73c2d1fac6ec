"""One stream as its user sees it: a trio half-closeable stream over whatever channel is up."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from tunnels.allowance import WAKE_S
from tunnels.errors import StreamError, StreamLost, StreamRefused, StreamReset
from tunnels.frames import MAX_DATA_BYTES, Ack, Record, RecordDecoder, ResetCode, clip_reason
from tunnels.link import Channel
from tunnels.opening import drain
from tunnels.peer import PeerId
from tunnels.resume import Failure, StreamState

RECEIVE_BYTES = 256 << 10  # receive_some without a size
ASK_AGAIN_S = 0.5  # what a link in debt owes may be paid sooner, by the rate it shares


class Carrier(Protocol):
    """Carries a stream by itself, over channels that it can use (splice.py)."""

    async def ride(self, channel: Channel, decoder: RecordDecoder) -> bool: ...

    def halt(self) -> None: ...


class Stream(trio.abc.HalfCloseableStream):
    """An ordered byte stream to a service of a peer, or from a peer to a service of ours.

    Reads and writes raise StreamRefused, StreamReset or StreamLost once the stream has failed,
    and trio.ClosedResourceError once `aclose` was called here. `send_all` returns when the last
    byte is on its way, and waits while the reader does not read.
    """

    def __init__(
        self,
        peer: PeerId,
        service: str,
        number: int,
        *,
        opened_here: bool,
        state: StreamState,
        changed: Callable[[Stream], None],
    ) -> None:
        self.peer = peer
        self.service = service
        self.number = number
        self.opened_here = opened_here
        self.reattached = trio.Event()
        self._state = state
        self._changed = changed
        self._channel: Channel | None = None
        self._lost: str | None = None
        self._closed = False
        self._sending = False
        self._receiving = False
        self._next_channel: Channel | None = None
        self._carrier: Carrier | None = None
        self._reading: trio.CancelScope | None = None
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        return f"Stream({self.service!r}, peer={self.peer.short})"

    # --- writing ------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is already sending on this stream")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._sending = True
        try:
            view = memoryview(data).cast("B")
            self._check_writable()
            while view:
                await self._wait_room()
                size = min(self._state.sendable_bytes, MAX_DATA_BYTES)
                self._state.send(bytes(view[:size]))
                view = view[size:]
                self._flush()
        finally:
            self._sending = False
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check_writable()
        await self._wait_room()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._state.ended and not self._state.stopped_by_peer:
            return
        self._check_writable()
        self._state.end()
        self._flush()

    async def _wait_room(self) -> None:
        while True:
            self._check_writable()
            if not self._state.sendable_bytes:
                await self._writers.park()
                continue
            channel = self._channel
            if channel is None:
                return  # kept for the next channel, as far as the window goes
            await channel.wait_writable()
            if channel is self._channel and self._state.sendable_bytes:
                self._check_writable()
                return

    def _check_writable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed here")
        self._check_failed()
        if self._state.stopped_by_peer:
            raise StreamReset("the other side reads no more of this stream")
        if self._lost is not None:
            raise StreamLost(self._lost)
        if self._state.ended:
            raise trio.ClosedResourceError("send_eof was called on this stream")

    # --- reading ------------------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        if self._receiving:
            raise trio.BusyResourceError("another task is already reading this stream")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._receiving = True
        try:
            while not self._readable():
                await self._readers.park()
        finally:
            self._receiving = False
        data = self._state.take(max_bytes or RECEIVE_BYTES)
        self._flush()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return data

    def _readable(self) -> bool:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed here")
        self._check_failed()
        if self._state.readable_bytes or self._state.at_end:
            return True
        if self._lost is not None:
            raise StreamLost(self._lost)
        return False

    # --- ending -------------------------------------------------------------------------

    async def aclose(self) -> None:
        """End both directions: what was sent still arrives, what was not read is dropped."""
        self.close_now()
        await trio.lowlevel.checkpoint()

    def close_now(self) -> None:
        """The same, without the checkpoint."""
        if not self._closed:
            self._closed = True
            self._halt()
            self._state.end()
            self._state.stop()
            self._flush()
            self._wake()
            if self.lingering:
                self._changed(self)

    def reset(self, reason: str) -> None:
        """Give the stream up at once; the other side's reads and writes fail with `reason`."""
        self.fail(ResetCode.FAILED, reason)

    def fail(self, code: ResetCode, reason: str) -> None:
        self._halt()
        self._state.reset(code, clip_reason(reason))
        self._flush()
        self._wake()

    def lose(self, reason: str) -> None:
        """The session is gone. What has arrived can still be read."""
        if self._lost is None:
            self._lost = reason
        self.detach()
        self._wake()

    def _check_failed(self) -> None:
        failure = self._state.failure
        if failure is not None:
            raise _error_of(failure)

    def reroute(self, channel: Channel) -> None:
        """Stop reading the channel in use: the stream is to go on over this one."""
        if self._next_channel is not None:
            self._next_channel.reset()
        self._next_channel = channel
        self._halt()
        self._stop_reading()

    def take_next_channel(self) -> Channel | None:
        channel, self._next_channel = self._next_channel, None
        return channel

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()

    # --- carried by others --------------------------------------------------------------

    def board(self, carrier: Carrier) -> None:
        """From now on `carrier` alone uses this stream; it is offered each channel."""
        self._carrier = carrier
        self._stop_reading()

    def disembark(self) -> None:
        self._halt()
        self._carrier = None

    def _halt(self) -> None:
        """Before anything is done to the state that a thread may be busy with."""
        if self._carrier is not None:
            self._carrier.halt()

    @property
    def state(self) -> StreamState:
        return self._state

    @property
    def sendable_bytes(self) -> int:
        return self._state.sendable_bytes

    def send_now(self, data: bytes) -> None:
        """Up to `sendable_bytes`, without waiting."""
        for start in range(0, len(data), MAX_DATA_BYTES):
            self._state.send(data[start : start + MAX_DATA_BYTES])
        self._flush()

    def send_some(self, data: bytes | memoryview) -> int:
        """As much as may leave now, without waiting; how much that was."""
        self._check_writable()
        taken = min(len(data), self._state.sendable_bytes)
        if taken:
            self.send_now(bytes(data[:taken]))
        return taken

    def end_now(self) -> None:
        self._state.end()
        self._flush()

    # --- the channel below --------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self._state.finished

    @property
    def lingering(self) -> bool:
        """Closed here, and what was sent has not all arrived yet."""
        return self._closed and not self._state.finished

    @property
    def kept_bytes(self) -> int:
        """Sent, and not yet acknowledged."""
        return self._state.kept_bytes

    def release(self) -> None:
        self._state.release()

    @property
    def position(self) -> Ack:
        return self._state.position

    @property
    def was_heard(self) -> bool:
        """The other side has said something: it knows the stream."""
        return self._state.was_heard

    @property
    def channel(self) -> Channel | None:
        return self._channel

    def attach(self, channel: Channel, position: Ack | None = None) -> None:
        """Use `channel`; `position` is the other side's when the stream is being resumed."""
        self._halt()
        self._channel = channel
        if position is not None:
            self._state.reattach(position)
        self.reattached.set()
        self._flush()
        self._wake()

    def detach(self) -> None:
        self._halt()
        self._channel = None
        self._state.detach()
        self.reattached = trio.Event()
        self._writers.unpark_all()

    async def read_channel(self, channel: Channel, decoder: RecordDecoder) -> None:
        """Take records until the channel ends, or another has taken or is to take its place.

        Raises LinkClosed, BadFrame.
        """
        while self._channel is channel and self._next_channel is None:
            if self.finished:
                await drain(channel)
                return
            if self._carrier is not None and await self._carrier.ride(channel, decoder):
                self._flush()
                self._wake()
                continue
            with trio.CancelScope() as self._reading:
                data = await channel.receive()
            if self._reading.cancelled_caught:
                continue
            if not data or self._channel is not channel:
                return
            began_s, before = time.thread_time(), self._state.received_bytes
            self.take_records(decoder.feed_untrusted(data))
            channel.share.earn(self._state.received_bytes - before)
            spent_s = WAKE_S + time.thread_time() - began_s
            channel.share.charge(spent_s, trio.current_time())
            while wait_s := channel.share.wait_s(trio.current_time()):  # noqa: ASYNC110 - no event
                await trio.sleep(min(wait_s, ASK_AGAIN_S))

    def take_records(self, records: list[Record]) -> None:
        self._halt()
        for record in records:
            self._state.receive(record)
        self._flush()
        self._wake()

    def _flush(self) -> None:
        if self._channel is not None:
            records = self._state.outgoing()
            if records:
                self._channel.send(records[0] if len(records) == 1 else b"".join(records))
            if self._state.finished:
                self._channel.finish()
        if self._state.finished:
            self._changed(self)

    def _wake(self) -> None:
        self._readers.unpark_all()
        self._writers.unpark_all()


Handler = Callable[[Stream], Awaitable[None]]
"""Of a service: it owns the stream until it returns."""


def _error_of(failure: Failure) -> StreamError:
    kinds = {
        ResetCode.REFUSED: StreamRefused,
        ResetCode.LOST: StreamLost,
        ResetCode.FAILED: StreamReset,
    }
    return kinds[failure.code](failure.reason or "the stream was reset without a reason")
