"""The size of one QUIC connection's datagrams: what its path carries, and no more (pmtu.py)."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from tunnels import quic_tuning as tuning
from tunnels.binding import Address
from tunnels.pmtu import LARGEST_V4_BYTES, LARGEST_V6_BYTES, PathMtu

# Between two nodes on one machine; below the 16383 that aioquic's packet headers can say. The
# cost of QUIC in Python is per packet, so this is ten times the throughput.
SAME_MACHINE_DATAGRAM_BYTES = 16000


class DatagramSize:
    """I try what the path of a connection carries, and follow it when it is another one."""

    def __init__(
        self,
        quic: tuning.BoundedConnection,
        remote: Address,
        is_this_machine: Callable[[str], bool],
        now: float,
    ) -> None:
        self._quic = quic
        self._is_this_machine = is_this_machine
        self._mtu: PathMtu | None = None  # none on this machine: there it is known
        self.follow(remote, now)

    def follow(self, remote: Address, now: float) -> None:
        """The path is another one, or the first."""
        if self._is_this_machine(remote[0]):
            self._mtu = None
            tuning.set_datagram_bytes(self._quic, SAME_MACHINE_DATAGRAM_BYTES)
            return
        largest = LARGEST_V6_BYTES if ":" in remote[0] else LARGEST_V4_BYTES
        self._mtu = PathMtu(largest, now)
        self._quic.large_packets = self._mtu
        tuning.set_datagram_bytes(self._quic, self._mtu.size)

    def update(self, now: float) -> bytes | None:
        """Sets the size for what is sent next; returns a probe, which goes before that."""
        mtu = self._mtu
        if mtu is None:
            return None
        tuning.set_datagram_bytes(self._quic, mtu.size)
        size = mtu.probe(now)
        if size is None:
            return None

        def told(delivered: bool) -> None:
            (mtu.delivered if delivered else mtu.lost)(size, trio.current_time())

        return tuning.size_probe(self._quic, size, now, told)

    def deadline(self) -> float:
        return math.inf if self._mtu is None else self._mtu.deadline()

    def timed_out(self, now: float) -> None:
        """A probe timeout (RFC 9002 section 6.2) has passed without an answer."""
        if self._mtu is not None:
            self._mtu.timed_out(now)
