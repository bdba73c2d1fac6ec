"""The node's one UDP socket. The rest of the package knows the protocol `DatagramSocket` only.

On Linux, runs of equal datagrams leave in one system call (UDP_SEGMENT) and arrive in one
(UDP_GRO), and ICMP errors are read from the error queue (IP_RECVERR; see ip(7), udp(7)): they
tell a dialler at once that nobody listens. They are hints only: anyone on the path can forge
them, so they never end a link that stands.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from tunnels.binding import Address, bound_socket, plain_host, reason_of

Unreachable = Callable[[Address, str], None]

SOCKET_BUFFER_BYTES = 4 << 20
MAX_BATCH_DATAGRAMS = 256
MAX_QUEUED_RUNS = 64  # waiting for the kernel, 64 KiB each; beyond, the network is said to drop
MAX_SEGMENTS = 44  # in one UDP_SEGMENT call
MAX_RUN_BYTES = 65000  # a UDP payload's limit is 65507
_MAX_PACKET_BYTES = 65535

_LINUX = sys.platform == "linux"
_SOL_UDP = 17
_UDP_SEGMENT = 103
_UDP_GRO = 104
_IP_MTU_DISCOVER = 10
_IPV6_MTU_DISCOVER = 23
_PMTUDISC_PROBE = 3
_IP_RECVERR = 11
_IPV6_RECVERR = 25
_MSG_ERRQUEUE = 0x2000
_EXTENDED_ERROR = struct.Struct("=IBBBBII")  # struct sock_extended_err, linux/errqueue.h


class DatagramSocket(Protocol):
    """One bound socket. Datagrams may be lost, doubled, reordered; never altered or cut."""

    on_unreachable: Unreachable | None

    @property
    def local(self) -> Address: ...

    def send(self, datagrams: Sequence[bytes], to: Address) -> None:
        """Hand datagrams to the network. Never blocks, never raises: it may drop."""

    async def receive(self) -> Sequence[tuple[bytes, Address]]:
        """At least one datagram with its sender. Raises trio.ClosedResourceError after close."""

    async def flush(self) -> None:
        """Runs beside `receive`, sending what `send` could not at once; until cancelled."""

    def close(self) -> None: ...


def bind(host: str | None, port: int) -> DatagramSocket:
    """A socket of this machine; host None: every interface. Raises ListenFailed."""
    return UdpSocket(bound_socket(host, port, socket.SOCK_DGRAM))


class UdpSocket:
    """I batch datagrams over one kernel socket.

    may_fragment: larger ones than the path carries are cut in pieces on the way.
    """

    def __init__(self, sock: socket.socket, *, may_fragment: bool = False) -> None:
        self._socket = sock
        self._mapped = sock.family == socket.AF_INET6
        self._closed = False
        self._queue: deque[tuple[Sequence[bytes], Address]] = deque()
        self._queued = trio.Event()
        self._segments = _LINUX
        self.on_unreachable: Unreachable | None = None
        sock.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        if _LINUX:
            self._ask_linux(sock)
            if not may_fragment:
                self._ask_linux_to_send_whole(sock)

    def _ask_linux(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        if self._mapped:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)

    def _ask_linux_to_send_whole(self, sock: socket.socket) -> None:
        # No datagram is cut in pieces on the way, whatever the kernel has heard of the path: how
        # large they may be is found by trying (pmtu.py).
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
        if self._mapped:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)

    @property
    def local(self) -> Address:
        host, port = self._socket.getsockname()[:2]
        return plain_host(host), port

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    # --- sending ------------------------------------------------------------------------

    def send(self, datagrams: Sequence[bytes], to: Address) -> None:
        if self._closed:
            return
        for run in _equal_runs(datagrams) if self._segments else ([d] for d in datagrams):
            if self._queue or not self._send_run(run, to):
                self._enqueue(run, to)

    def _enqueue(self, run: Sequence[bytes], to: Address) -> None:
        if len(self._queue) < MAX_QUEUED_RUNS:
            self._queue.append((run, to))
            self._queued.set()

    async def flush(self) -> None:
        while True:
            await self._queued.wait()
            await trio.lowlevel.wait_writable(self._socket)
            while self._queue and not self._closed and self._send_run(*self._queue[0]):
                self._queue.popleft()
            if not self._queue:
                self._queued = trio.Event()

    def _send_run(self, run: Sequence[bytes], to: Address) -> bool:
        """False when the kernel has no room now. Any other failure drops the run."""
        host, port = to
        target = (f"::ffff:{host}", port) if self._mapped and ":" not in host else to
        ancillary = []
        if len(run) > 1:
            ancillary.append((_SOL_UDP, _UDP_SEGMENT, struct.pack("=H", len(run[0]))))
        for attempt in range(2):
            try:
                self._socket.sendmsg(run, ancillary, 0, target)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                # An ICMP error left by an earlier datagram is reported on the next call.
                if attempt == 0 and error.errno in (errno.ECONNREFUSED, errno.EHOSTUNREACH):
                    continue
                self._send_failed(run, to, error)
            break
        return True

    def _send_failed(self, run: Sequence[bytes], to: Address, error: OSError) -> None:
        if len(run) > 1 and error.errno in (errno.EIO, errno.EINVAL, errno.EMSGSIZE):
            self._segments = error.errno == errno.EMSGSIZE  # this path only, not this socket
            for datagram in run:
                self._send_run([datagram], to)
        elif self.on_unreachable is not None and error.errno != errno.EMSGSIZE:
            self.on_unreachable(to, reason_of(error.errno))

    # --- receiving ----------------------------------------------------------------------

    async def receive(self) -> Sequence[tuple[bytes, Address]]:
        while True:
            if self._closed:
                raise trio.ClosedResourceError
            # Before looking: after a batch there is seldom more, and looking costs two calls.
            await trio.lowlevel.wait_readable(self._socket)
            if batch := self._receive_ready():
                return batch

    def _receive_ready(self) -> list[tuple[bytes, Address]]:
        batch: list[tuple[bytes, Address]] = []
        while len(batch) < MAX_BATCH_DATAGRAMS:
            try:
                data, ancillary, _, sender = self._socket.recvmsg(_MAX_PACKET_BYTES, 64)
            except (BlockingIOError, InterruptedError):
                if not batch:
                    self._drain_errors()
                break
            except OSError:
                self._drain_errors()  # an ICMP error, not the end of the socket
                break
            address = (plain_host(sender[0]), sender[1])
            size = _segment_bytes(ancillary) or len(data)
            if size == len(data):
                batch.append((data, address))
            else:
                batch += [(data[i : i + size], address) for i in range(0, len(data), size)]
        return batch

    def _drain_errors(self) -> None:
        if not _LINUX:
            return
        for _ in range(MAX_BATCH_DATAGRAMS):
            try:
                _, ancillary, _, target = self._socket.recvmsg(0, 512, _MSG_ERRQUEUE)
            except OSError:
                return
            for _, kind, content in ancillary:
                if kind in (_IP_RECVERR, _IPV6_RECVERR) and self.on_unreachable and target:
                    code = _EXTENDED_ERROR.unpack_from(content)[0]
                    if code != errno.EMSGSIZE:
                        self.on_unreachable((plain_host(target[0]), target[1]), reason_of(code))


def _segment_bytes(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, content in ancillary:
        if level == _SOL_UDP and kind == _UDP_GRO:
            return int.from_bytes(content[:2], sys.byteorder)
    return 0


def _equal_runs(datagrams: Sequence[bytes]) -> list[list[bytes]]:
    """Cut into runs that UDP_SEGMENT can carry: equal sizes, the last one may be shorter."""
    runs: list[list[bytes]] = []
    run: list[bytes] = []
    for datagram in datagrams:
        if run and (
            len(run) == MAX_SEGMENTS
            or (len(run) + 1) * len(run[0]) > MAX_RUN_BYTES
            or len(run[-1]) != len(run[0])  # a shorter one ends its run
            or len(datagram) > len(run[0])
        ):
            runs.append(run)
            run = []
        run.append(datagram)
    if run:
        runs.append(run)
    return runs
