"""Windows and acknowledgements of one direction of a stream, counted in bytes.

The reader decides how much may be on the way to it. It starts with INITIAL_WINDOW_BYTES and
doubles up to MAX_WINDOW_BYTES each time its user has consumed a whole window: a stalled reader
holds little, a fast one is not held back by the round trip (4 MiB is 40 MB/s at 100 ms).

The sender keeps what is not acknowledged, which is never more than the reader's window.
"""

from __future__ import annotations

from tunnels.errors import BadFrame

INITIAL_WINDOW_BYTES = 1 << 20
MAX_WINDOW_BYTES = 4 << 20
ACK_EVERY_BYTES = 256 << 10  # received but not acknowledged: bounds what the sender keeps


class ReceiveWindow:
    """I say how far the other side may send, and when it is worth telling it."""

    def __init__(
        self,
        initial_bytes: int = INITIAL_WINDOW_BYTES,
        maximum_bytes: int = MAX_WINDOW_BYTES,
    ) -> None:
        self._size = initial_bytes
        self._maximum = max(initial_bytes, maximum_bytes)
        self._consumed = 0
        self._grown_at = 0  # what was consumed when the window last grew
        self._acked = 0
        self.limit = initial_bytes  # as last told to the other side

    @property
    def size_bytes(self) -> int:
        return self._size

    def check(self, end_offset: int) -> None:
        """Raise BadFrame when bytes up to `end_offset` were not allowed."""
        if end_offset > self.limit:
            raise BadFrame("more bytes than the window allows")

    def consume(self, count: int) -> None:
        """The user has taken `count` bytes."""
        self._consumed += count
        if self._consumed - self._grown_at >= self._size:
            self._grown_at = self._consumed
            self._size = min(2 * self._size, self._maximum)

    def ack_due(self, received: int) -> bool:
        """True when an ACK would free enough on the other side to be worth its bytes."""
        opened = self._consumed + self._size - self.limit
        return opened * 4 >= self._size or received - self._acked >= ACK_EVERY_BYTES

    def ack(self, received: int) -> int:
        """An ACK is being sent with `received`; returns the limit it carries."""
        self._acked = received
        self.limit = max(self.limit, self._consumed + self._size)
        return self.limit


class SendWindow:
    """I say how much may be sent and which part the other side has."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.sent = 0
        self.acked = 0

    @property
    def available_bytes(self) -> int:
        return self._limit - self.sent

    def spend(self, count: int) -> None:
        """`count` bytes are handed to the channel."""
        if count > self.available_bytes:
            raise ValueError("the window does not allow this many bytes")
        self.sent += count

    def on_ack(self, received: int, limit: int) -> None:
        """The other side has the first `received` bytes and takes up to `limit`.

        Raises BadFrame for bytes never sent. An ACK older than one already seen changes nothing.
        """
        if received > self.sent:
            raise BadFrame("an ACK for bytes that were never sent")
        self.acked = max(self.acked, received)
        self._limit = max(self._limit, limit)
