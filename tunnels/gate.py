"""How many streams one peer, and all together, may open to a service, and how often.

A stream beyond a limit is refused with a sentence; nothing else happens to its session. Sans-IO.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tunnels.allowance import Bucket, Buckets, Rate
from tunnels.peer import PeerId


@dataclass(frozen=True)
class ServiceLimits:
    """At once for one peer and in all; new ones for one peer and in all."""

    peer_streams: int
    streams: int
    peer_rate: Rate
    rate: Rate


# What a peer does a few times a session: join, renew.
TALK = ServiceLimits(
    peer_streams=2, streams=64, peer_rate=Rate(0.5, burst=8), rate=Rate(16, burst=64)
)
# A node that is started again and again says hello each time, and when its addresses change.
GREET = ServiceLimits(
    peer_streams=2, streams=64, peer_rate=Rate(1, burst=32), rate=Rate(16, burst=64)
)
# What a peer asks for now and then, and what may then last: facts, leases, files.
ASK = ServiceLimits(
    peer_streams=16, streams=256, peer_rate=Rate(2, burst=32), rate=Rate(50, burst=256)
)
# Everything else: a backstop far above what a program does.
WORK = ServiceLimits(
    peer_streams=100, streams=2000, peer_rate=Rate(100, burst=512), rate=Rate(1000, burst=4000)
)


class ServiceGate:
    """I count the streams of one service. `leave` must follow each `enter` that let one in."""

    def __init__(self, limits: ServiceLimits, now: float) -> None:
        self._limits = limits
        self._open: Counter[PeerId] = Counter()
        self._peers = Buckets(limits.peer_rate)
        self._all = Bucket(limits.rate, now)

    @property
    def streams(self) -> int:
        return self._open.total()

    def enter(self, peer: PeerId, now: float) -> str | None:
        """None when the stream may open, else the sentence why not. What is refused to one peer
        takes nothing from the others."""
        if self._open[peer] >= self._limits.peer_streams:
            return "too many streams to this service are open; close some first"
        if self.streams >= self._limits.streams:
            return "this service is busy with others; try again later"
        if not self._peers.take(peer, now):
            return "this service was asked too often; wait a little"
        if not self._all.take(now):
            return "this service is asked too often by many; try again later"
        self._open[peer] += 1
        return None

    def leave(self, peer: PeerId) -> None:
        self._open[peer] -= 1
        if not self._open[peer]:
            del self._open[peer]
