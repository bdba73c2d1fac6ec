"""How much of this node one peer may use. Sans-IO: seconds and amounts go in, decisions come out.

Work is counted in the time it took, not in messages: a datagram may hold one frame or a thousand.
It is the processor time of the node's own thread (`time.thread_time`, a microsecond to ask for):
read off the clock, it would charge an honest peer for whatever else keeps the machine busy, and the
engine's threads do. A link earns time by the stream bytes it carries, at EARNED_S_PER_BYTE, several
times what they cost; so whoever moves data is never held back, and whoever only makes work has:

    own     a small rate: STRANGER for all strangers of one network, MEMBER for a peer once it is
            introduced. By network and by peer, so that a new link is no new allowance
    shared  SHARED, one rate for all links of the node together

A link in debt is not heard: its datagrams are dropped, which its congestion control takes for a
full network, and its channels are not read, which closes its windows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """`per_s` in the long run, `burst` at once."""

    per_s: float
    burst: float


STRANGER = Rate(per_s=0.005, burst=0.05)  # processor seconds a second
MEMBER = Rate(per_s=0.03, burst=0.25)
SHARED = Rate(per_s=0.06, burst=0.1)
EARNED_S_PER_BYTE = 0.2e-6  # carrying one costs 0.03e-6 on a core of 2020
MAX_EARNED_S = 0.5
LEAST_WAIT_S = 1e-6
WAKE_S = 0.05e-3  # a task that runs once more on a peer's behalf, beside what it does
OPENING_S = 0.5e-3  # a channel that the peer opens: its tasks, its header, its end


class Bucket:
    """A token bucket. Its level may be negative: then it is in debt."""

    def __init__(self, rate: Rate, now: float) -> None:
        self._rate = rate
        self._level = rate.burst
        self._at_s = now

    def level(self, now: float) -> float:
        self._level = min(
            self._rate.burst, self._level + max(0.0, now - self._at_s) * self._rate.per_s
        )
        self._at_s = now
        return self._level

    def take(self, now: float, amount: float = 1.0) -> bool:
        """Take all of `amount`, or nothing."""
        if self.level(now) < amount:
            return False
        self._level -= amount
        return True

    def take_up_to(self, now: float, amount: float) -> float:
        """Take what is there of `amount`; returns what was taken."""
        taken = min(max(0.0, self.level(now)), amount)
        self._level -= taken
        return taken

    def spend(self, now: float, amount: float) -> None:
        """Take `amount`, into debt if need be."""
        self.level(now)
        self._level -= amount

    def wait_s(self, now: float) -> float:
        """Until the debt is paid; 0 when there is none worth a clock's tick: a sleep of less than
        the clock can tell would never end."""
        wait_s = -self.level(now) / self._rate.per_s
        return wait_s if wait_s > LEAST_WAIT_S else 0.0

    def is_full(self, now: float) -> bool:
        return self.level(now) >= self._rate.burst


class Buckets:
    """One bucket a key. A full one need not be remembered; of `limit` others, the oldest is
    forgotten, which only ever favours its owner."""

    def __init__(self, rate: Rate, limit: int = 4096) -> None:
        self._rate = rate
        self._limit = limit
        self._buckets: OrderedDict[Hashable, Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: Hashable, now: float, amount: float = 1.0) -> bool:
        return self._bucket(key, now).take(now, amount)

    def spend(self, key: Hashable, now: float, amount: float) -> float:
        """Take `amount`, into debt if need be; how long until that is paid."""
        bucket = self._bucket(key, now)
        bucket.spend(now, amount)
        return bucket.wait_s(now)

    def level(self, key: Hashable, now: float) -> float:
        return self._bucket(key, now).level(now)

    def wait_s(self, key: Hashable, now: float) -> float:
        return self._bucket(key, now).wait_s(now)

    def _bucket(self, key: Hashable, now: float) -> Bucket:
        bucket = self._buckets.get(key)
        if bucket is None:
            self._make_room(now)
            bucket = self._buckets[key] = Bucket(self._rate, now)
        return bucket

    def _make_room(self, now: float) -> None:
        while self._buckets:
            oldest = next(iter(self._buckets))
            if len(self._buckets) < self._limit and not self._buckets[oldest].is_full(now):
                return
            del self._buckets[oldest]


class Budget:
    """This node's processor, as it is shared out among all its links."""

    def __init__(self, now: float) -> None:
        self.shared = Bucket(SHARED, now)
        self.strangers = Buckets(STRANGER)
        self.members = Buckets(MEMBER)

    def share(self, network: Hashable) -> Share:
        """For a new link to somebody there, a stranger until it is welcomed. One whose address may
        be forged gets a key of its own instead, until `Share.comes_from`."""
        return Share(self, network)


class Share:
    """One link's part of the budget."""

    def __init__(self, budget: Budget, network: Hashable) -> None:
        self._budget = budget
        self._own, self._key = budget.strangers, network
        self._earned_s = 0.0

    def comes_from(self, network: Hashable, now: float) -> None:
        """A stranger's address is proven: what it has cost so far is its network's."""
        if self._own is self._budget.strangers and self._key != network:
            spent_s = STRANGER.burst - self._own.level(self._key, now)
            self._key = network
            self._own.spend(network, now, spent_s)

    def welcome(self, peer: Hashable) -> None:
        """The peer is a member: it has a member's rate, with all its links."""
        self._own, self._key = self._budget.members, peer

    def earn(self, carried_bytes: int) -> None:
        self._earned_s = min(MAX_EARNED_S, self._earned_s + carried_bytes * EARNED_S_PER_BYTE)

    def charge(self, spent_s: float, now: float) -> None:
        """Processor time was spent on this link."""
        from_earned_s = min(self._earned_s, spent_s)
        self._earned_s -= from_earned_s
        self._own.spend(self._key, now, spent_s - from_earned_s)
        self._settle(now)

    def wait_s(self, now: float) -> float:
        """How long the link must not be heard; 0 when it may be. Others may empty the shared
        rate meanwhile or fill it: ask again then."""
        self._settle(now)
        return self._own.wait_s(self._key, now)

    def _settle(self, now: float) -> None:
        debt_s = -self._own.level(self._key, now)
        if debt_s > 0:
            from_earned_s = min(self._earned_s, debt_s)
            self._earned_s -= from_earned_s
            paid_s = from_earned_s + self._budget.shared.take_up_to(now, debt_s - from_earned_s)
            self._own.spend(self._key, now, -paid_s)
