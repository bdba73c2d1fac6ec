"""What can be said of links and sessions at any moment. Frozen values, and where they come from."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tunnels.handshake import Role

if TYPE_CHECKING:
    from tunnels.heartbeat import Heartbeat
    from tunnels.link import Link

RELAYED_KINDS = frozenset({"relay"})
"""Kinds of links that lead through somebody else's node."""

# struct tcp_info of linux/tcp.h: tcpi_total_retrans, and 32 bytes on tcpi_segs_out (Linux 4.2).
_TCP_INFO_BYTES = 140
_TOTAL_RETRANS = struct.Struct("=100xI32xI")


@dataclass(frozen=True)
class Losses:
    """Packets of ours: handed to the network, and thought to be lost on the way."""

    sent: int = 0
    lost: int = 0

    @property
    def share(self) -> float | None:
        """From 0 to 1; None before anything was sent."""
        return self.lost / self.sent if self.sent else None


@runtime_checkable
class CountsLosses(Protocol):
    """A link that can know what was lost."""

    @property
    def losses(self) -> Losses | None: ...


@runtime_checkable
class MayBeRelayed(Protocol):
    """A link that leads straight to the peer, or through a server."""

    @property
    def is_relayed(self) -> bool: ...


@dataclass(frozen=True)
class LinkStats:
    """One link of a session.

    loss: share of our packets, None where the link cannot know. since_s: trio's clock.
    """

    kind: str
    remote: str
    in_use: bool
    relayed: bool
    dialled_here: bool
    suspected: bool
    rtt_s: float | None
    smoothed_rtt_s: float | None
    jitter_s: float | None
    loss: float | None
    bytes_in: int
    bytes_out: int
    since_s: float


@dataclass(frozen=True)
class SessionStats:
    """Bytes on the wire over all links so far; the link in use (kind, remote address)."""

    bytes_in: int
    bytes_out: int
    link_kind: str | None
    remote: str | None


def link_stats(link: Link, beat: Heartbeat, *, in_use: bool) -> LinkStats:
    losses = link.losses if isinstance(link, CountsLosses) else None
    trips = beat.round_trips
    return LinkStats(
        kind=link.kind,
        remote=link.remote,
        in_use=in_use,
        relayed=link.is_relayed if isinstance(link, MayBeRelayed) else link.kind in RELAYED_KINDS,
        dialled_here=link.role is Role.DIALLER,
        suspected=beat.suspected,
        rtt_s=trips.least_s,
        smoothed_rtt_s=trips.smoothed_s,
        jitter_s=trips.jitter_s,
        loss=None if losses is None else losses.share,
        bytes_in=link.bytes_in,
        bytes_out=link.bytes_out,
        since_s=beat.since_s,
    )


def kernel_losses(sockets: Iterable[socket.socket | None]) -> Losses | None:
    """Segments sent, and sent again, over these connections; None where the kernel does not say."""
    sent = lost = 0
    for sock in sockets:
        found = _tcp_info(sock)
        if found is None:
            return None
        lost, sent = lost + found[0], sent + found[1]
    return Losses(sent, lost)


def _tcp_info(sock: socket.socket | None) -> tuple[int, int] | None:
    if sock is None or sys.platform != "linux":
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:  # closed meanwhile
        return None
    if len(info) < _TCP_INFO_BYTES:
        return None
    retransmitted, segments = _TOTAL_RETRANS.unpack(info)
    return retransmitted, segments
