"""Windows and acknowledgements of one direction of a stream, counted in bytes.

The reader decides how much may be on the way to it. It starts with INITIAL_WINDOW_BYTES and
doubles up to MAX_WINDOW_BYTES each time its user has consumed a whole window: a stalled reader
holds little, a fast one is not held back by the round trip (4 MiB is 40 MB/s at 100 ms).

The sender keeps what is not acknowledged: never more than the reader's window, nor than its own
cap, which starts and grows as the window does, since the reader's word may be a lie.

What windows and caps grow by comes out of a `Pool`, one for the windows and one for the caps of a
session: a peer that opens many streams and reads or feeds none of them makes us hold at most
MAX_STREAMS x INITIAL_WINDOW_BYTES + POOL_BYTES in each direction.
"""

from __future__ import annotations

from tunnels.errors import BadFrame

INITIAL_WINDOW_BYTES = 128 << 10
MAX_WINDOW_BYTES = 4 << 20
POOL_BYTES = 16 << 20
# Received but not acknowledged: bounds what the sender keeps, and is below its cap, which
# would otherwise never be lifted.
ACK_EVERY_BYTES = 64 << 10


class Pool:
    """Bytes that the streams of a session share to grow by."""

    def __init__(self, size_bytes: int = POOL_BYTES) -> None:
        self.free_bytes = size_bytes

    def take(self, wanted: int) -> int:
        """As much of `wanted` as there is."""
        taken = min(wanted, self.free_bytes)
        self.free_bytes -= taken
        return taken

    def give_back(self, count: int) -> None:
        self.free_bytes += count


class _Growing:
    """A size that doubles with each whole size of use, as far as the pool goes."""

    def __init__(self, initial_bytes: int, maximum_bytes: int, pool: Pool) -> None:
        self.bytes = initial_bytes
        self._maximum = max(initial_bytes, maximum_bytes)
        self._pool = pool
        self._borrowed = 0
        self._grown_at = 0  # what was used when it last grew

    def used(self, total: int) -> None:
        """`total` bytes were used so far."""
        if total - self._grown_at >= self.bytes:
            self._grown_at = total
            growth = self._pool.take(min(self.bytes, self._maximum - self.bytes))
            self._borrowed += growth
            self.bytes += growth

    def release(self) -> None:
        self._pool.give_back(self._borrowed)
        self._borrowed = 0
        self._maximum = self.bytes  # it grows no more


class ReceiveWindow:
    """I say how far the other side may send, and when it is worth telling it."""

    def __init__(
        self,
        initial_bytes: int = INITIAL_WINDOW_BYTES,
        maximum_bytes: int = MAX_WINDOW_BYTES,
        pool: Pool | None = None,
    ) -> None:
        self._size = _Growing(initial_bytes, maximum_bytes, pool or Pool())
        self._consumed = 0
        self._acked = 0
        self.limit = initial_bytes  # as last told to the other side

    @property
    def size_bytes(self) -> int:
        return self._size.bytes

    def check(self, end_offset: int) -> None:
        """Raise BadFrame when bytes up to `end_offset` were not allowed."""
        if end_offset > self.limit:
            raise BadFrame("more bytes than the window allows")

    def consume(self, count: int) -> None:
        """The user has taken `count` bytes."""
        self._consumed += count
        self._size.used(self._consumed)

    def ack_due(self, received: int) -> bool:
        """True when an ACK would free enough on the other side to be worth its bytes."""
        opened = self._consumed + self._size.bytes - self.limit
        unacked = received - self._acked
        return opened * 4 >= self._size.bytes or unacked >= ACK_EVERY_BYTES

    def ack(self, received: int) -> int:
        """An ACK is being sent with `received`; returns the limit it carries."""
        self._acked = received
        self.limit = max(self.limit, self._consumed + self._size.bytes)
        return self.limit

    def release(self) -> None:
        """The stream is over: what its window had grown by is others' now."""
        self._size.release()


class SendWindow:
    """I say how much may be sent and which part the other side has."""

    def __init__(self, limit: int, pool: Pool | None = None) -> None:
        self._limit = limit
        self._cap = _Growing(INITIAL_WINDOW_BYTES, MAX_WINDOW_BYTES, pool or Pool())
        self.sent = 0
        self.acked = 0

    @property
    def available_bytes(self) -> int:
        return max(0, min(self._limit, self.acked + self._cap.bytes) - self.sent)

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
        self._cap.used(self.acked)

    def release(self) -> None:
        self._cap.release()
