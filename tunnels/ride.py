"""A thread that carries one stream between a local socket and its channel's own connection.

An event loop in Python costs a millisecond's tenth each time it wakes, and four wakings lie between
a question and its answer. So while a stream is nothing but carried (splice.py) and its channel is a
connection of its own, a thread does it: it waits for both sockets at once, and what comes out of
one goes into the other before it waits again. Records, credit and acknowledgements are the same
as ever: when the channel dies the stream goes on elsewhere from where it was.

One lock says who has the stream's state. The thread holds it whenever it is not waiting; `halt`
takes the state away from it for good, from the event loop, at any moment.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from tunnels.errors import BadFrame, LinkClosed
from tunnels.frames import DATA_HEAD_BYTES, MAX_DATA_BYTES, RecordDecoder
from tunnels.link import Wire
from tunnels.resume import StreamState

HEARD_BYTES = 256 << 10  # taken from the connection at once
PLAIN_BYTES = HEARD_BYTES + (64 << 10)  # what that may be once decrypted, with what was left before
# Into one record: it and its head make four whole records of TLS.
FETCHED_BYTES = MAX_DATA_BYTES - DATA_HEAD_BYTES
FETCHES = 4  # records made of what the local socket has, before the rest is seen to
LARGE_BYTES = 32 << 10  # of so much that is sent no copy is made
HEARINGS = 4
MUCH_BYTES = 64 << 10
MANY_PIECES = 16
TURNS = 16  # of little; after so many the processor time is looked at
SETTLE_S = 0.005  # of processor time, after which the event loop is told what was spent
SETTLE_BYTES = 8 << 20

_READABLE = select.POLLIN | select.POLLHUP | select.POLLERR if hasattr(select, "poll") else 0
CAN_RIDE = bool(_READABLE)


class _Shelf:
    """Room for records, used again once the other side has acknowledged what was in it: memory that
    is asked for and given back a thousand times a second costs as much as the encryption."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []
        self._lent: deque[tuple[int, memoryview]] = deque()

    def take(self, acked_bytes: int) -> memoryview:
        """One that is free until it is lent."""
        while self._lent and self._lent[0][0] <= acked_bytes:
            self._free.append(self._lent.popleft()[1])
        if not self._free:
            self._free.append(memoryview(bytearray(MAX_DATA_BYTES)))
        return self._free[-1]

    def lend(self, record: memoryview, end_offset: int) -> None:
        """The stream keeps what is in it until `end_offset` is acknowledged."""
        self._free.remove(record)
        self._lent.append((end_offset, record))


class Ride:
    """I run in a thread until the channel is gone, the local socket is, both directions have
    ended, or somebody halts me.

    settle(spent_s, carried_bytes): called in the thread, now and then. leftover: what had arrived
    and the local socket has not taken yet, to go first. ended: which directions have, up and down.
    Raises OSError when there is no descriptor left for it.
    """

    def __init__(
        self,
        state: StreamState,
        decoder: RecordDecoder,
        wire: Wire,
        local: socket.socket,
        leftover: bytes,
        ended: tuple[bool, bool],
        settle: Callable[[float, int], None],
    ) -> None:
        self._bell, self._ear = socket.socketpair()  # before anything of the stream is touched
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self.lock = threading.Lock()
        self.up_ended, self.down_ended = ended  # and the other end of that direction knows
        self.failure: Exception | None = None  # of the channel, or of the local socket
        self.heard_at_s = -math.inf  # anything on the channel
        self.held = False  # the link's share of this node is used up: hear nothing more
        self._state = state
        self._decoder = decoder
        self._wire = wire
        self._local = local
        self._settle = settle
        self._halted = False
        self._shelf = _Shelf()
        self._plain = memoryview(bytearray(PLAIN_BYTES))
        self._undelivered: list[bytes | memoryview] = [leftover] if leftover else []
        self._not_consumed = 0  # of what is undelivered, as the window counts
        self._is_first = True
        self._turns = TURNS  # until the processor time is looked at
        self._told_s = 0.0  # of this thread's processor time, in `settle`
        self._carried = 0
        self._poll = select.poll()
        self._poll.register(self._ear, select.POLLIN)
        self._local_number, self._local_interest = local.fileno(), 0
        self._wire_number, self._wire_interest = wire.fileno(), 0
        if arrived := state.take(state.readable_bytes):
            self._undelivered.append(arrived)
        state.sink = self._sink

    # --- from the event loop ------------------------------------------------------------

    def halt(self) -> bytes:
        """The state is no longer the thread's. Returns what was not delivered; the thread ends
        soon, and `close` may be called then."""
        with self.lock:
            leftover = self._hand_over()
        self.wake()
        return leftover

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # it is rung already, or closed
            self._bell.send(b"\0")

    def close(self) -> None:
        self._bell.close()
        self._ear.close()

    # --- the thread ---------------------------------------------------------------------

    def run(self) -> None:
        self._told_s = time.thread_time()
        try:
            while self._once():
                pass
        except (LinkClosed, BadFrame, OSError) as error:
            self.failure = error

    def _once(self) -> bool:
        """Wait, and do all that can be done. False when it is over."""
        ready: list[tuple[int, int]] = []
        if not self._is_first:
            self._ask()
            ready = self._poll.poll()
        with self.lock:
            if self._halted:
                return False
            if self._is_first:
                # There may be bytes inside the TLS of which no socket knows any more.
                self._is_first = False
                self._take(self._wire.pushed_back())
                self._hear()
            for descriptor, events in ready:
                self._handle(descriptor, events)
            self._deliver()
            self._say()
            self._turns -= 1
            if self._turns <= 0:
                self._turns = TURNS
                self._account()
            return not self._is_over()

    def _is_over(self) -> bool:
        state = self._state
        unread = state.stopped_by_peer and not self.up_ended
        return bool(state.failure) or unread or (self.up_ended and self.down_ended)

    def _handle(self, descriptor: int, events: int) -> None:
        if descriptor == self._local_number:
            if events & _READABLE:
                self._fetch()
        elif descriptor == self._wire_number:
            if events & _READABLE:
                self._hear_on()
        else:
            self._ear.recv(4096)
            if self._wire.gone is not None:
                raise LinkClosed(self._wire.gone)

    def _account(self) -> None:
        now_s = time.thread_time()
        if now_s - self._told_s > SETTLE_S or self._carried > SETTLE_BYTES:
            self._settle(now_s - self._told_s, self._carried)
            self._told_s, self._carried = now_s, 0

    def _ask(self) -> None:
        """Tell `poll` what we wait for."""
        up = down = 0
        if not self.up_ended and not self._wire.unsent and self._state.sendable_bytes:
            up = select.POLLIN
        if self._undelivered:
            up |= select.POLLOUT
        if not self.held:
            down = select.POLLIN
        if self._wire.unsent:
            down |= select.POLLOUT
        if up != self._local_interest:
            self._local_interest = self._want(self._local_number, up)
        if down != self._wire_interest:
            self._wire_interest = self._want(self._wire_number, down)

    def _want(self, descriptor: int, events: int) -> int:
        # One of which nothing is wanted is left out: its hang-up would be reported without end.
        if events:
            self._poll.register(descriptor, events)
        else:
            self._poll.unregister(descriptor)
        return events

    # --- local socket -> channel --------------------------------------------------------

    def _fetch(self) -> None:
        state = self._state
        for _ in range(FETCHES):
            room = min(state.sendable_bytes, FETCHED_BYTES)
            if self.up_ended or not room:
                break
            record = self._shelf.take(state.acked_bytes)
            try:
                size = self._local.recv_into(record[DATA_HEAD_BYTES:], room)
            except (BlockingIOError, InterruptedError):
                break
            if not size:
                self.up_ended = True
                state.end()
                break
            payload = record[DATA_HEAD_BYTES : DATA_HEAD_BYTES + size]
            is_large = size >= LARGE_BYTES
            record[:DATA_HEAD_BYTES] = state.keep(payload if is_large else bytes(payload))
            if is_large:
                self._shelf.lend(record, state.sent_bytes)
            self._wire.write(record[: DATA_HEAD_BYTES + size])
            self._wire.flush()
            self._carried += size
            if size < room or self._wire.unsent:
                break

    def _say(self) -> None:
        if records := self._state.outgoing():
            self._wire.write(records[0] if len(records) == 1 else b"".join(records))
            self._wire.flush()
        elif self._wire.unsent:
            self._wire.flush()

    # --- channel -> local socket --------------------------------------------------------

    def _hear_on(self) -> None:
        """While much comes and the local socket takes it, it is acknowledged together."""
        for _ in range(HEARINGS):
            if self._hear() < MUCH_BYTES:
                return
            self._turns = 0  # it may have been a great many records
            self._deliver()
            if self._undelivered:
                return

    def _hear(self) -> int:
        """Also while the local socket is full: there are acknowledgements between the bytes, and
        without those it may stay so for ever. What cannot be delivered, the window bounds."""
        if self._undelivered:
            self._state.sink = None
            if self._not_consumed:  # it is in `_plain`, which is needed now
                self._state.consumed(self._not_consumed)
                self._not_consumed = 0
                self._undelivered = [b"".join(self._undelivered)]
        if count := self._wire.hear(self._plain):
            self.heard_at_s = time.monotonic()
        self._take(self._plain[:count])
        self._state.sink = self._sink
        return count

    def _take(self, data: bytes | memoryview) -> None:
        for record in self._decoder.feed_untrusted(data):
            self._state.receive(record)

    def _sink(self, payload: bytes | memoryview) -> None:
        self._undelivered.append(payload)
        self._not_consumed += len(payload)
        self._carried += len(payload)

    def _deliver(self) -> None:
        state = self._state
        while self._undelivered or state.readable_bytes:
            if not self._undelivered:
                self._undelivered.append(state.take(HEARD_BYTES))
            elif len(self._undelivered) > MANY_PIECES:
                self._undelivered = [b"".join(self._undelivered)]
            try:
                taken = self._local.sendmsg(self._undelivered)
            except (BlockingIOError, InterruptedError):
                return
            self._taken(taken)
        if state.at_end and not self.down_ended:
            self.down_ended = True
            self._local.shutdown(socket.SHUT_WR)

    def _taken(self, count: int) -> None:
        left = sum(map(len, self._undelivered)) - count
        if left < self._not_consumed:  # what was left over at the start was consumed before
            self._state.consumed(self._not_consumed - left)
            self._not_consumed = left
        if not left:
            self._undelivered.clear()
            return
        while count >= len(self._undelivered[0]):
            count -= len(self._undelivered.pop(0))
        self._undelivered[0] = memoryview(self._undelivered[0])[count:]

    def _hand_over(self) -> bytes:
        leftover = b"".join(self._undelivered)
        if not self._halted:
            self._halted = True
            self._state.sink = None
            self._state.consumed(self._not_consumed)
            self._settle(0.0, self._carried)
        self._undelivered = []
        return leftover
