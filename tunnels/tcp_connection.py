"""One TLS connection of a tcp link: a ByteSocket and its TLS, with a queue between."""

from __future__ import annotations

import contextlib
import math
import socket as stdlib_socket
import time
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from tunnels.allowance import Share
from tunnels.errors import LinkClosed
from tunnels.tcp_socket import ByteSocket
from tunnels.tls import Tls

UNSENT_BYTES = 256 << 10  # encrypted and not yet taken by the kernel: beyond, writers wait
LINGER_S = 1.0  # for the other side to take a goodbye
HEARD_BYTES = 256 << 10  # by a thread, at once
ASK_AGAIN_S = 0.1  # what a link in debt owes may be paid sooner, by the rate it shares

Spawn = Callable[[Callable[[], Awaitable[None]]], bool]


class Connection:
    """Sends without waiting, receives what arrived. One task may receive, one wait to write.

    spawn: runs a task that sends what the network could not take at once; False when the node has
    stopped and runs no more.
    """

    def __init__(self, socket: ByteSocket, tls: Tls, share: Share, spawn: Spawn) -> None:
        self.socket = socket
        self.tls = tls
        self.share = share  # pays for what is done here
        self.may_send_bytes: float = math.inf  # the other side, all in all
        self.bytes_in = 0
        self.bytes_out = 0
        self.on_over: Callable[[], None] = lambda: None  # both directions have ended, or it is gone
        self._spawn = spawn
        self.unsent: deque[memoryview] = deque()
        self.unsentd_bytes = 0
        self._sending = False
        self._finishing = False
        self._finished = False
        self._at_end = False
        self._gone: str | None = None
        self._broken: str | None = None  # nothing can be sent any more
        self._pushed_back = b""
        self._writers = trio.lowlevel.ParkingLot()
        self._hearing = False
        self._left = trio.lowlevel.ParkingLot()
        self._lent: LentConnection | None = None

    # --- the beginning ------------------------------------------------------------------

    async def establish(self) -> None:
        """Run the TLS handshake. Raises LinkClosed."""
        while True:
            with self._charged():
                try:
                    self.tls.shake_hands()
                finally:
                    self._send_raw(self.tls.outgoing())  # the alert of a failure, too
            if self.tls.established:
                return
            if not await self._hear():
                raise LinkClosed("the other side ended the TLS handshake")

    def push_back(self, data: bytes) -> None:
        """`receive` returns this first."""
        self._pushed_back = data

    # --- sending ------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Queue and transmit; does nothing after `finish` or once the connection is gone."""
        if self._finishing or self._gone is not None:
            return
        self.share.earn(len(data))
        try:
            self.tls.write(data)
        except LinkClosed as error:
            self.lose(str(error))
            return
        self._send_raw(self.tls.outgoing())

    async def wait_writable(self) -> None:
        while self._gone is None and not self._finishing and not self.is_writable:
            await self._writers.park()

    @property
    def is_writable(self) -> bool:
        return self.unsentd_bytes <= UNSENT_BYTES

    def finish(self) -> None:
        """No byte follows; what is queued still leaves."""
        self._finishing = True
        self._writers.unpark_all()
        if not self.unsent:
            self._finish()

    def _finish(self) -> None:
        if not self._finished and self._gone is None and self._broken is None:
            self._finished = True
            self.socket.finish()
            self._check_over()

    def _send_raw(self, data: bytes) -> None:
        if not data or self._gone is not None:
            return
        self.enqueue(data)
        if not self._sending:
            self._send_queued()
            self._see_to_queue()

    def _see_to_queue(self) -> None:
        if self.unsent and self._gone is None and self._lent is None and not self._sending:
            self._sending = self._spawn(self._keep_sending)
            if not self._sending:
                self.lose("this node has stopped")

    def _send_queued(self) -> None:
        try:
            self.flush()
        except OSError as error:
            # What the other side said before may still be there to read: its goodbye, say.
            self._broken = _why(error)
            self._finishing = True
            self.unsent.clear()
            self.unsentd_bytes = 0
            self._writers.unpark_all()

    def flush(self) -> bool:
        """Send what is queued, as far as the network takes it; True when nothing is left.

        Raises OSError.
        """
        while self.unsent:
            taken = self.socket.send(self.unsent[0])
            self.unsentd_bytes -= taken
            if taken < len(self.unsent[0]):
                self.unsent[0] = self.unsent[0][taken:]
                return False
            self.unsent.popleft()
        return True

    def enqueue(self, data: bytes) -> None:
        """Encrypted bytes, to be sent by `flush`."""
        if data:
            self.bytes_out += len(data)
            self.unsentd_bytes += len(data)
            self.unsent.append(memoryview(data))

    async def _keep_sending(self) -> None:
        try:
            while self.unsent and self._gone is None:
                await self.socket.wait_writable()
                self._send_queued()
                if self.is_writable:
                    self._writers.unpark_all()
        except (OSError, trio.ClosedResourceError):
            self.lose("the connection broke")
        finally:
            self._sending = False
            self._left.unpark_all()
        if self._finishing:
            self._finish()

    # --- receiving ----------------------------------------------------------------------

    async def receive(self) -> bytes:
        """What has arrived, at least one byte; b"" at the end. Raises LinkClosed."""
        if self._pushed_back:
            return self.take_pushed_back()
        while not self._at_end:
            if self._gone is not None:
                raise LinkClosed(self._gone)
            with self._charged():
                data = self._read()
            if data:
                return data
            if not await self._hear():
                if self._broken is not None:
                    self.lose(self._broken)
                    raise LinkClosed(self._broken)
                self._at_end = True
                self._check_over()
        return b""

    def _read(self) -> bytes:
        try:
            return self.tls.read()
        except LinkClosed as error:
            self.lose(str(error))
            raise

    async def _hear(self) -> bool:
        """Feed TLS with what comes next; False at the end."""
        while wait_s := self.share.wait_s(trio.current_time()):  # noqa: ASYNC110 - no event
            await trio.sleep(min(wait_s, ASK_AGAIN_S))
        self._hearing = True
        try:
            data = await self.socket.receive()
        except (OSError, trio.ClosedResourceError) as error:
            self.lose(_why(error))
            raise LinkClosed(self._gone or "") from error
        finally:
            self._hearing = False
            self._left.unpark_all()
        self.bytes_in += len(data)
        if self.bytes_in > self.may_send_bytes:
            raise LinkClosed("too much data before the handshake")
        self.tls.feed(data)
        return bool(data)

    @contextlib.contextmanager
    def _charged(self):  # type: ignore[no-untyped-def]
        began_s = time.thread_time()
        try:
            yield
        finally:
            self.share.charge(time.thread_time() - began_s, trio.current_time())

    # --- lent to a thread ---------------------------------------------------------------

    @property
    def can_lend(self) -> bool:
        return self.socket.kernel is not None

    async def lend(self, wake: Callable[[], None]) -> LentConnection | None:
        """Until it is given back nobody else reads here, and nobody waits to write."""
        while (self._sending or self._hearing) and self._gone is None:
            await self._left.park()
        kernel = self.socket.kernel
        if self._gone is not None or self._at_end or self._broken or kernel is None:
            return None
        self._lent = LentConnection(self, kernel, wake)
        return self._lent

    def take_back(self) -> None:
        self._lent = None
        self._see_to_queue()

    def take_pushed_back(self) -> bytes:
        data, self._pushed_back = self._pushed_back, b""
        return data

    # --- the end ------------------------------------------------------------------------

    @property
    def gone(self) -> str | None:
        return self._gone

    def lose(self, reason: str) -> None:
        """Be gone at once, unless it is already: readers and writers learn the reason."""
        self._leave(reason, self.socket.close)

    def reset(self, reason: str) -> None:
        """The same, and the other side sees a reset."""
        self._leave(reason, self.socket.reset)

    def _leave(self, reason: str, shut: Callable[[], None]) -> None:
        if self._gone is None:
            self._gone = reason
            self.unsent.clear()
            self.unsentd_bytes = 0
            if self._lent is None:
                shut()
            else:
                self._lent.lose(shut)
            self._writers.unpark_all()
            self.on_over()

    def say_goodbye(self, reason: str) -> None:
        """Be gone as soon as what is queued has left and the other side has ended its side too:
        closed earlier, the kernel would answer what still comes with a reset, and the other side
        might never read our last words."""
        if self._gone is None:
            self._gone = reason
            self._finishing = True
            self._writers.unpark_all()
            if not self._spawn(self._linger):
                self._close_now()
            self.on_over()

    async def _linger(self) -> None:
        try:
            with trio.move_on_after(LINGER_S), contextlib.suppress(OSError):
                while self._hearing or self._sending:
                    await self._left.park()
                while not self.flush():
                    await self.socket.wait_writable()
                self.socket.finish()
                while await self.socket.receive():
                    pass
        except trio.ClosedResourceError:
            pass
        finally:
            self._close_now()

    def _close_now(self) -> None:
        """With what of our last words the network takes at once."""
        with contextlib.suppress(OSError):
            self.flush()
        self.socket.finish()
        self.socket.drop_arrived()
        self.socket.close()

    def _check_over(self) -> None:
        if self._at_end and self._finished:
            self.lose("the channel is over")


class LentConnection:
    """A connection in the hands of a thread: link.Wire."""

    def __init__(
        self, connection: Connection, kernel: stdlib_socket.socket, wake: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._kernel = kernel
        self._wake = wake
        self._tls = connection.tls
        self._raw = memoryview(bytearray(HEARD_BYTES))
        self.unsent: deque[memoryview] = connection.unsent
        self._shut: Callable[[], None] | None = None

    @property
    def gone(self) -> str | None:
        return self._connection.gone

    def fileno(self) -> int:
        return self._kernel.fileno()

    def hear(self, into: memoryview) -> int:
        connection = self._connection
        try:
            count = self._kernel.recv_into(self._raw)
        except (BlockingIOError, InterruptedError):
            return self._tls.read_into(into)
        except OSError as error:
            raise LinkClosed(_why(error)) from error
        if not count:
            raise LinkClosed(connection.gone or "the other side ended the channel")
        connection.bytes_in += count
        self._tls.feed(self._raw[:count])
        return self._tls.read_into(into)

    def pushed_back(self) -> bytes:
        return self._connection.take_pushed_back()

    def write(self, data: bytes | memoryview) -> None:
        self._tls.write(data)

    def flush(self) -> None:
        data, connection = self._tls.outgoing(), self._connection
        try:
            if not self.unsent and data:
                taken = connection.socket.send(data)
                connection.bytes_out += taken
                if taken == len(data):
                    return
                data = data[taken:]
            connection.enqueue(data)
            connection.flush()
        except OSError as error:
            raise LinkClosed(_why(error)) from error

    def give_back(self) -> None:
        self._connection.take_back()
        if self._shut is not None:
            self._shut()

    def lose(self, shut: Callable[[], None]) -> None:
        """The connection is gone; its descriptor must not be closed while a thread waits for it."""
        self._shut = shut
        with contextlib.suppress(OSError):
            self._kernel.shutdown(stdlib_socket.SHUT_RDWR)
        self._wake()


def _why(error: Exception) -> str:
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return "the other side reset the channel"
    return f"the connection broke: {str(getattr(error, 'strerror', None) or 'closed here').lower()}"
