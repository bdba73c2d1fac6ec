"""What may be sent to addresses that nobody has answered from yet. Sans-IO.

A peer names addresses, and a datagram names its sender: either may be a lie, and then a third party
gets what we send. So to an address that has not answered go UNASKED_BYTES at most, for all the
ports of its host together, IP and UDP headers counted.

`Consent` counts for one search, which takes seconds; `Knocks` for as long as a node runs.
"""

from __future__ import annotations

from collections import Counter

from tunnels.allowance import Buckets, Rate
from tunnels.binding import Address

UNASKED_BYTES = 1024
KNOCKING = Rate(per_s=12.8, burst=768)  # bytes: in no quarter of a minute more than UNASKED_BYTES
HEADER_BYTES = {4: 28, 6: 48}  # IP and UDP


class Consent:
    """I remember who has answered, and count what goes to all others."""

    def __init__(self) -> None:
        self._answered: set[Address] = set()
        self._sent_bytes: Counter[str] = Counter()  # by host, without an answer
        self._most_bytes: dict[str, int] = {}  # where it is not UNASKED_BYTES

    def __bool__(self) -> bool:
        """Whether anybody has answered."""
        return bool(self._answered)

    def answered(self, address: Address) -> None:
        self._answered.add(address)

    def allow(self, host: str, most_bytes: int) -> None:
        self._most_bytes[host] = most_bytes

    def take(self, to: Address, size: int) -> bool:
        """Whether a datagram of this size may go there; if so it is counted."""
        if to in self._answered:
            return True
        host = to[0]
        total = self._sent_bytes[host] + with_headers(host, size)
        if total > self._most_bytes.get(host, UNASKED_BYTES):
            return False
        self._sent_bytes[host] = total
        return True


class Knocks:
    """I count what asks at a door whether anybody is in. Who answers is not charged for it."""

    def __init__(self) -> None:
        self._left_bytes = Buckets(KNOCKING)  # by host
        self._sent_bytes: Counter[Address] = Counter()  # at doors that are being knocked at

    def take(self, to: Address, size: int, now: float) -> bool:
        """Whether a datagram of this size may go there; if so it is counted."""
        total = with_headers(to[0], size)
        if not self._left_bytes.take(to[0], now, total):
            return False
        self._sent_bytes[to] += total
        return True

    def over(self, to: Address, now: float, *, answered: bool) -> None:
        sent_bytes = self._sent_bytes.pop(to, 0)
        if answered:
            self._left_bytes.spend(to[0], now, -sent_bytes)


def with_headers(host: str, size: int) -> int:
    return size + HEADER_BYTES[6 if ":" in host else 4]
