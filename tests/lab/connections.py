"""TCP in a fake world: in order and complete, late when the network loses, silent when cut."""

from __future__ import annotations

import errno
import socket
from collections import deque
from typing import TYPE_CHECKING

import trio

from tunnels.binding import Address
from tunnels.errors import ListenFailed, Refused

if TYPE_CHECKING:
    from tests.lab.datagrams import World

WINDOW_BYTES = 256 << 10  # on the way and not yet read, each direction
SEGMENT_BYTES = 64 << 10
RETRY_S = 0.2  # after a loss
CUT_RETRY_S = 1.0  # while nothing comes through

Segment = bytes | None  # None: the end


class FakeListener:
    """A tunnels.tcp_socket.Listener."""

    def __init__(self, world: World, address: Address) -> None:
        host, port = address[0], address[1] or world.free_port()
        self._world = world
        self._local = (host, port)
        if self._local in world.listeners:
            raise ListenFailed(f"cannot listen on TCP {host}:{port}: the port is in use")
        world.listeners[self._local] = self
        self._arrived: deque[FakeConnection] = deque()
        self._acceptors = trio.lowlevel.ParkingLot()
        self._closed = False

    @property
    def local(self) -> Address:
        return self._local

    async def accept(self) -> FakeConnection:
        await trio.lowlevel.checkpoint()
        while not self._arrived:
            if self._closed:
                raise trio.ClosedResourceError
            await self._acceptors.park()
        return self._arrived.popleft()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            del self._world.listeners[self._local]
            self._acceptors.unpark_all()

    def move(self, host: str) -> None:
        self._local = (host, self._local[1])

    def arrive(self, connection: FakeConnection) -> None:
        self._arrived.append(connection)
        self._acceptors.unpark_all()


async def connect(world: World, host: str, to: Address) -> FakeConnection:
    """A three-way handshake. Raises LinkClosed when the other side refuses; waits for ever when
    nothing answers."""
    while True:
        await trio.sleep(2 * _takes_s(world))
        if to in world.refusing:
            raise Refused("refused: no node listens on that port")
        local = seen = (host, world.free_port())
        internet, at = world.internet, to
        if internet is not None:
            way = internet.connection(local, to)
            if way is None and internet.refuses(to) and not world.cut:
                raise Refused("refused: no node listens on that port")
            seen, at = way or (local, ("nowhere", 0))
        listener = world.listeners.get(at)
        through = not (
            world.cut
            or world.tcp_blocked
            or {host, to[0]} & world.unplugged
            or to[0] in world.hidden
        )
        if listener is not None and through:
            break
        await trio.sleep(CUT_RETRY_S)
    near = FakeConnection(world, local, to)
    far = FakeConnection(world, to, seen)
    near.other, far.other = far, near
    listener.arrive(far)
    return near


def _takes_s(world: World) -> float:
    weather = world.weather
    takes_s = weather.delay_s + world.dice.random() * weather.jitter_s
    while world.dice.random() < weather.loss:
        world.lost += 1
        takes_s += RETRY_S
    return takes_s


class FakeConnection:
    """One end: a tunnels.tcp_socket.ByteSocket."""

    kernel: socket.socket | None = None

    def __init__(self, world: World, local: Address, remote: Address) -> None:
        self.local = local
        self.remote = remote
        self.other: FakeConnection
        self._world = world
        self._era = world.era
        self._flying: deque[Segment] = deque()  # to the other end, in order
        self._last_landing_s = 0.0
        self._window_bytes = WINDOW_BYTES  # what may still be sent
        self._arrived: deque[bytes] = deque()
        self._at_end = False
        self._finished = False
        self._was_reset = False
        self._closed = False
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()

    def send(self, data: bytes | memoryview) -> int:
        self._check()
        taken = min(len(data), self._window_bytes)
        self._window_bytes -= taken
        for start in range(0, taken, SEGMENT_BYTES):
            self._fly(bytes(data[start : min(start + SEGMENT_BYTES, taken)]))
        return taken

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()
        while not (self._window_bytes or self._was_reset):
            self._check()
            await self._writers.park()

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._arrived:
            if self._closed:
                raise trio.ClosedResourceError
            if self._was_reset:
                raise OSError(errno.ECONNRESET, "Connection reset by peer")
            if self._at_end:
                return b""
            await self._readers.park()
        data = self._arrived.popleft()
        self.other.room(len(data))
        return data

    def drop_arrived(self) -> None:
        self._arrived.clear()

    def finish(self) -> None:
        if not self._finished and not self._closed:
            self._finished = True
            self._fly(None)

    def reset(self) -> None:
        if not self._closed:
            self._world.later(trio.current_time() + _takes_s(self._world), self.other.hear_reset)
        self.close()

    def close(self) -> None:
        if not self._closed:
            self.finish()
            self._closed = True
            self._readers.unpark_all()
            self._writers.unpark_all()

    # --- the network --------------------------------------------------------------------

    def room(self, count: int) -> None:
        self._window_bytes += count
        self._writers.unpark_all()

    def hear_reset(self) -> None:
        if not self._is_through():
            return
        self._was_reset = True
        self._readers.unpark_all()
        self._writers.unpark_all()

    def _fly(self, segment: Segment) -> None:
        self._flying.append(segment)
        self._world.sent += 1
        lands_at_s = trio.current_time() + _takes_s(self._world)
        self._last_landing_s = max(self._last_landing_s, lands_at_s)
        self._world.later(self._last_landing_s, self._land)

    def _land(self) -> None:
        if not self._is_through():
            if not self._is_gone and self._era == self._world.era:
                self._world.later(trio.current_time() + CUT_RETRY_S, self._land)
            return
        self.other.arrive(self._flying.popleft())

    def arrive(self, segment: Segment) -> None:
        if self._closed:
            if segment is not None:
                self._world.later(trio.current_time(), self.other.hear_reset)
        elif segment is None:
            self._at_end = True
        else:
            self._arrived.append(segment)
        self._readers.unpark_all()

    @property
    def _is_gone(self) -> bool:
        """Of its machines, whatever a NAT makes of their addresses."""
        return bool({self.local[0], self.other.local[0]} & self._world.unplugged)

    def _is_through(self) -> bool:
        return self._era == self._world.era and not (self._world.cut or self._is_gone)

    def _check(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        if self._was_reset:
            raise OSError(errno.EPIPE, "Broken pipe")
