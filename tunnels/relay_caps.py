"""How much a node carries for others: for one peer, and for all strangers together. Sans-IO.

Whoever asks to be joined to another peer pays for both directions. What it may have depends on who
it is to us, which may change while its streams stand: an invitee becomes a member.

| | a member, at a relay | a member, at any other node | a stranger |
|---|---|---|---|
| streams at once | 64 | 16 | 8 |
| new ones | 256, then 20 a second | 32, then 8 a minute | 24, then 8 a minute |
| bytes of one stream | no limit | 256 KiB | 256 KiB |
| bytes at once, then a second | 64 MiB, 32 MiB/s | 1 MiB, 64 KiB/s | 1 MiB, 64 KiB/s |
| bytes at once, then a day | 64 GiB, 64 GiB | 64 MiB, 64 MiB | 4 MiB, 4 MiB |

All strangers together have ALL_STRANGERS: peer ids cost nothing to make.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

from tunnels.allowance import Bucket, Rate
from tunnels.peer import PeerId

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DAY_S = 24 * 3600
MAX_STREAMS = 512  # carried at once, of all peers together
MAX_ACCOUNTS = 1024  # peers whose use is remembered beyond those that have streams now
OPENING_BYTES = 6 << 10  # what a stream costs before its first byte: two ends, two TLS handshakes


class Standing(Enum):
    """What a peer is to this node. A member counts for more at a node that is a relay."""

    CARRIED = "a member, at a relay"
    INTRODUCED = "a member, at any other node"
    STRANGER = "a stranger"


@dataclass(frozen=True)
class Caps:
    """streams: at once. openings: new ones. pace: bytes a second. total: bytes in the long run."""

    streams: int
    openings: Rate
    stream_bytes: float
    pace: Rate
    total: Rate


def _a_day(size_bytes: float) -> Rate:
    return Rate(per_s=size_bytes / DAY_S, burst=size_bytes)


CAPS = {
    Standing.CARRIED: Caps(
        64, Rate(20, 256), math.inf, Rate(per_s=32 * MIB, burst=64 * MIB), _a_day(64 * GIB)
    ),
    Standing.INTRODUCED: Caps(
        16, Rate(8 / 60, 32), 256 * KIB, Rate(per_s=64 * KIB, burst=1 * MIB), _a_day(64 * MIB)
    ),
    Standing.STRANGER: Caps(
        8, Rate(8 / 60, 24), 256 * KIB, Rate(per_s=64 * KIB, burst=1 * MIB), _a_day(4 * MIB)
    ),
}
ALL_STRANGERS = Caps(
    64, Rate(4, 64), math.inf, Rate(per_s=512 * KIB, burst=8 * MIB), _a_day(1 * GIB)
)


class CapReached(Exception):
    """The sentence says which, to whoever asked."""


class Account:
    """One peer's use of this node, as long as its standing stays."""

    def __init__(self, caps: Caps, now: float) -> None:
        self.caps = caps
        self.streams = 0
        self._openings = Bucket(caps.openings, now)
        self._pace = Bucket(caps.pace, now)
        self._total = Bucket(caps.total, now)

    def check_enter(self, now: float) -> None:
        """Raises CapReached."""
        if self.streams >= self.caps.streams:
            raise CapReached("too many streams are relayed; close some first")
        if self._openings.level(now) < 1:
            raise CapReached("streams are opened too often through this relay; wait a little")
        self.check_total(now)

    def check_total(self, now: float) -> None:
        """Raises CapReached."""
        if self._total.level(now) <= 0:
            raise CapReached("as much was relayed as is carried in a day; try again later")

    def enter(self, now: float) -> None:
        self.streams += 1
        self._openings.spend(now, 1)
        self.spend(now, OPENING_BYTES)

    def leave(self) -> None:
        self.streams -= 1

    def spend(self, now: float, size_bytes: int) -> float:
        """How long to wait before more is carried, seconds."""
        self._total.spend(now, size_bytes)
        self._pace.spend(now, size_bytes)
        return self._pace.wait_s(now)

    def is_idle(self, now: float) -> bool:
        """Nothing is lost when it is forgotten."""
        buckets = (self._openings, self._pace, self._total)
        return not self.streams and all(one.is_full(now) for one in buckets)


class Accounts:
    """I keep the books of all peers that this node carries for."""

    def __init__(self, now: float) -> None:
        self._strangers = Account(ALL_STRANGERS, now)
        self._accounts: OrderedDict[tuple[Standing, PeerId], Account] = OrderedDict()
        self.streams = 0

    def open(self, peer: PeerId, standing: Standing, now: float) -> Carriage:
        """One stream more. Raises CapReached."""
        if self.streams >= MAX_STREAMS:
            raise CapReached("this relay carries as much as it can; try again later")
        payers = self._payers(peer, standing, now)
        for one in payers:
            one.check_enter(now)
        for one in payers:
            one.enter(now)
        self.streams += 1
        return Carriage(self, peer, payers)

    def leave(self, payers: tuple[Account, ...]) -> None:
        self.streams -= 1
        for one in payers:
            one.leave()

    def _payers(self, peer: PeerId, standing: Standing, now: float) -> tuple[Account, ...]:
        key = standing, peer
        account = self._accounts.get(key)
        if account is None:
            self._make_room(now)
            account = self._accounts[key] = Account(CAPS[standing], now)
        return (account, self._strangers) if standing is Standing.STRANGER else (account,)

    def _make_room(self, now: float) -> None:
        """The oldest go first. One that is not idle is forgotten only where too many are, which
        favours its owner: what all strangers have together stays counted."""
        for key, account in list(self._accounts.items()):
            if account.streams:
                continue
            if len(self._accounts) < MAX_ACCOUNTS and not account.is_idle(now):
                return
            del self._accounts[key]

    def spend(self, carriage: Carriage, standing: Standing, size_bytes: int, now: float) -> float:
        """Bytes of one stream, either way; how long to wait, seconds. Raises CapReached."""
        if carriage.carried_bytes + size_bytes > CAPS[standing].stream_bytes:
            raise CapReached(
                "only introductions are carried here: a few hundred KiB a stream; start a relay "
                "(`mesh relay`) where both sides reach it"
            )
        carriage.carried_bytes += size_bytes
        payers = self._payers(carriage.peer, standing, now)
        for one in payers:
            one.check_total(now)
        return max(one.spend(now, size_bytes) for one in payers)


class Carriage:
    """One stream that is being carried. `leave` must follow."""

    def __init__(self, accounts: Accounts, peer: PeerId, payers: tuple[Account, ...]) -> None:
        self.peer = peer
        self.carried_bytes = 0
        self._accounts = accounts
        self._entered = payers

    def leave(self) -> None:
        self._accounts.leave(self._entered)
