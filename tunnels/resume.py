"""One stream's state at one end, apart from any channel.

Rules:
- What is sent is kept until the other side acknowledges it; the window bounds how much that is.
- While no channel is attached nothing is encoded: `reattach` sends all again that counts.
- A stream is finished when both directions have ended and we know that our END arrived,
  or when either side has reset it.
- After STOP the other side's bytes are dropped; it answers END at whatever offset it reached.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tunnels.credit import Pool, ReceiveWindow, SendWindow
from tunnels.errors import BadFrame
from tunnels.frames import (
    Ack,
    Data,
    End,
    Record,
    Reset,
    ResetCode,
    Stop,
    data_head,
    encode,
    encode_data,
)


@dataclass(frozen=True)
class Failure:
    """Why the stream failed, and on whose word."""

    code: ResetCode
    reason: str
    by_peer: bool


class StreamState:
    """I turn what the user does into records and records into what the user sees.

    `outgoing()` holds encoded records for the channel attached now, in order; the owner takes
    them after every call. Raises BadFrame when the other side breaks the rules.
    """

    def __init__(
        self,
        *,
        send_limit: int,
        window: ReceiveWindow | None = None,
        keeping: Pool | None = None,
    ) -> None:
        self._send = SendWindow(send_limit, keeping)
        self._window = window or ReceiveWindow()
        self._kept: deque[tuple[int, bytes | memoryview]] = deque()
        self._arrived = bytearray()
        self._received = 0
        self._outgoing: list[bytes] = []
        self._ack_is_last = False  # in `_outgoing`
        self.sink: Callable[[bytes | memoryview], None] | None = None  # takes what arrives
        self.attached = True
        self.was_heard = False  # the other side has said something
        self.ended = False  # the user, or the other side's STOP, ended our direction
        self.end_acked = False
        self.stopped_by_peer = False
        self.peer_ended = False
        self.stopped = False  # our user reads no more
        self.failure: Failure | None = None

    # --- what the user does -------------------------------------------------------------

    @property
    def sendable_bytes(self) -> int:
        """How much `send` takes now; 0 when the stream is ended, failed or out of credit."""
        return 0 if self.ended or self.failure else self._send.available_bytes

    @property
    def sent_bytes(self) -> int:
        """All that was sent so far."""
        return self._send.sent

    @property
    def acked_bytes(self) -> int:
        """What the other side is known to have of that."""
        return self._send.acked

    @property
    def kept_bytes(self) -> int:
        """Sent, not acknowledged, therefore kept."""
        return sum(len(data) for _, data in self._kept)

    def send(self, data: bytes) -> None:
        """Send up to `sendable_bytes` (and at most a DATA record's worth)."""
        head = self.keep(data)
        if self.attached:
            self._outgoing.append(head + data)
            self._ack_is_last = False

    def keep(self, data: bytes | memoryview) -> bytes:
        """`send` for an owner that writes to the channel itself: the head of the DATA record, to
        be followed by `data`, which must not change until it is acknowledged."""
        offset = self._send.sent
        self._send.spend(len(data))
        self._kept.append((offset, data))
        return data_head(offset, len(data))

    def end(self) -> None:
        """No byte follows. Ending twice is ending once."""
        if not self.ended and self.failure is None:
            self.ended = True
            self._emit(End(self._send.sent))

    def stop(self) -> None:
        """The user reads no more; what arrived and was not read is dropped."""
        if self.stopped or self.failure is not None:
            return
        self.stopped = True
        self._arrived.clear()
        if not self.peer_ended:
            self._emit(Stop())

    def reset(self, code: ResetCode, reason: str) -> None:
        """Give the stream up, both ways. The first failure stays the reason."""
        if self.failure is None and not self.finished:
            self._fail(Failure(code, reason, by_peer=False))
            self._emit(Reset(code, reason))

    @property
    def readable_bytes(self) -> int:
        return len(self._arrived)

    @property
    def at_end(self) -> bool:
        return self.peer_ended and not self._arrived

    def take(self, max_bytes: int) -> bytes:
        """Up to `max_bytes` that arrived; opens the window."""
        data = bytes(self._arrived[:max_bytes])
        del self._arrived[: len(data)]
        self._consume(len(data))
        return data

    @property
    def received_bytes(self) -> int:
        """All that arrived so far, taken by the user or not."""
        return self._received

    def consumed(self, count: int) -> None:
        """The user has taken `count` bytes that went to `sink`; opens the window."""
        self._consume(count)

    def release(self) -> None:
        """The stream is over: its part of the session's pools is for others."""
        self._window.release()
        self._send.release()

    # --- what the channel does ----------------------------------------------------------

    def receive(self, record: Record) -> None:
        """Take one record from the attached channel."""
        self.was_heard = True
        if self.failure is not None:
            return
        match record:
            case Data():
                self._receive_data(record)
            case Ack():
                self._receive_ack(record)
            case End():
                self._receive_end(record)
            case Stop():
                self._receive_stop()
            case Reset():
                self._fail(Failure(record.code, record.reason, by_peer=True))
            case _:
                raise BadFrame(f"a {type(record).__name__} record inside a stream")

    def outgoing(self) -> list[bytes]:
        """Encoded records to write to the channel now; each is handed out once."""
        records, self._outgoing = self._outgoing, []
        return records

    @property
    def finished(self) -> bool:
        return self.failure is not None or (self.end_acked and self.peer_ended)

    # --- when channels die --------------------------------------------------------------

    @property
    def position(self) -> Ack:
        """What we have received and allow: the RESUME header and its answer carry it."""
        received = self._received + self.peer_ended
        return Ack(received, self._window.ack(received))

    def detach(self) -> None:
        """The channel is gone; what it did not deliver will be sent again."""
        self.attached = False
        self._outgoing.clear()

    def reattach(self, position: Ack) -> None:
        """A new channel stands and the other side is at `position`: replay the rest."""
        self._outgoing.clear()
        self.attached = True
        if self.failure is not None:
            self._emit(Reset(self.failure.code, self.failure.reason))
            return
        self.was_heard = True
        if position.received < self._send.acked:
            raise BadFrame("the other side lost bytes that it had acknowledged")
        self._receive_ack(position)
        self._emit(self.position)
        for offset, data in self._kept:
            skip = max(0, position.received - offset)
            self._outgoing.append(encode_data(offset + skip, data[skip:]))
            self._ack_is_last = False
        if self.ended and not self.end_acked:
            self._emit(End(self._send.sent))
        if self.stopped and not self.peer_ended:
            self._emit(Stop())

    # --- inner --------------------------------------------------------------------------

    def _receive_data(self, data: Data) -> None:
        end = data.offset + len(data.payload)
        if data.offset != self._received or self.peer_ended:
            raise BadFrame("stream bytes out of order")
        self._window.check(end)
        self._received = end
        if self.stopped:
            return  # STOP is on its way: no credit, no copy
        if self.sink is not None and not self._arrived:
            self.sink(data.payload)
        else:
            self._arrived += data.payload
        if self._window.ack_due(self._received):
            self._emit(self.position)

    def _receive_end(self, end: End) -> None:
        in_place = end.offset == self._received or (self.stopped and end.offset > self._received)
        if not in_place or self.peer_ended:
            raise BadFrame("a stream's end out of order")
        self._received = end.offset
        self.peer_ended = True
        self._emit(self.position)

    def _receive_ack(self, ack: Ack) -> None:
        received = ack.received
        if self.ended and received == self._send.sent + 1:
            self.end_acked = True
            received -= 1
        self._send.on_ack(received, ack.limit)
        while self._kept and self._kept[0][0] + len(self._kept[0][1]) <= received:
            self._kept.popleft()

    def _receive_stop(self) -> None:
        self.stopped_by_peer = True
        self._kept.clear()
        self.end()

    def _consume(self, count: int) -> None:
        self._window.consume(count)
        if not self.peer_ended and self._window.ack_due(self._received):
            self._emit(self.position)

    def _fail(self, failure: Failure) -> None:
        self.failure = failure
        self._kept.clear()
        self._arrived.clear()
        self._outgoing.clear()

    def _emit(self, record: Record) -> None:
        if not self.attached:
            return
        if isinstance(record, Ack):
            if self._ack_is_last and self._outgoing:
                self._outgoing.pop()  # the newer says it all
            self._ack_is_last = True
        else:
            self._ack_is_last = False
        self._outgoing.append(encode(record))
