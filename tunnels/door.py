"""Which strangers are heard: half-open connections are few, and new ones come at a bounded rate.

A stranger's first datagram may bear any sender's address. While few are being heard it is taken at
its word; beyond UNCHECKED it must come again with a token that only its real address receives
(QUIC Retry, RFC 9000 section 8.1.2), so that nobody can fill the room in another's name. What is
counted "a network" is an IPv4 address or an IPv6 /64, which is what one customer has.

| limit | a network | in all |
|---|---|---|
| being heard at once | MAX_HALF_OPEN_PER_NETWORK | MAX_HALF_OPEN |
| new ones whose address was not checked | | UNCHECKED |
| new ones | PER_NETWORK | IN_ALL |
| Retry answers | | RETRIES |
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from enum import Enum

from tunnels.allowance import Bucket, Buckets, Rate

MAX_HALF_OPEN = 64
MAX_HALF_OPEN_PER_NETWORK = 16
UNCHECKED_HALF_OPEN = 16
UNCHECKED = Rate(per_s=8, burst=16)
PER_NETWORK = Rate(per_s=8, burst=48)
IN_ALL = Rate(per_s=32, burst=64)
RETRIES = Rate(per_s=500, burst=250)


class Verdict(Enum):
    HEAR = "hear it"
    RETRY = "let it prove its address first"
    DROP = "do not answer"


class Door:
    """I count who is being heard. `leave` must follow each HEAR."""

    def __init__(self, now: float) -> None:
        self._half_open: Counter[str] = Counter()
        self._unchecked = Bucket(UNCHECKED, now)
        self._per_network = Buckets(PER_NETWORK)
        self._in_all = Bucket(IN_ALL, now)
        self._retries = Bucket(RETRIES, now)

    @property
    def half_open(self) -> int:
        return self._half_open.total()

    def half_open_from(self, host: str) -> int:
        return self._half_open[network_of(host)]

    def knock(self, host: str, now: float, *, address_checked: bool) -> Verdict:
        """A stranger's first datagram came from `host` (an IP literal)."""
        network = network_of(host)
        if self.half_open >= MAX_HALF_OPEN or self._half_open[network] >= MAX_HALF_OPEN_PER_NETWORK:
            return Verdict.DROP
        if not address_checked and (
            self.half_open >= UNCHECKED_HALF_OPEN or not self._unchecked.take(now)
        ):
            return Verdict.RETRY if self._retries.take(now) else Verdict.DROP
        if not self._in_all.take(now) or not self._per_network.take(network, now):
            return Verdict.DROP
        self._half_open[network] += 1
        return Verdict.HEAR

    def leave(self, host: str) -> None:
        """One that was heard is a peer now, or gone."""
        network = network_of(host)
        self._half_open[network] -= 1
        if not self._half_open[network]:
            del self._half_open[network]


def network_of(host: str) -> str:
    """What counts as one customer's network."""
    if ":" not in host:
        return host
    return str(ipaddress.ip_network((host, 64), strict=False))
