"""From when on a worker that comes and goes may be counted on. Sans-IO.

A deployment that answers is only loaded anew for a worker that has stayed for a while: a short one
at first, a longer one after each deployment that was lost with it. So a machine on a bad link costs
a few reloads, not one a minute. Where nothing answers, nobody waits for this; but plans do without
a worker that was lost again and again, where they can, for as long.
"""

from __future__ import annotations

from collections.abc import Iterable

from tunnels import PeerId

SETTLE_S = 1.0
"""For workers never lost: several that are started together come within about a second."""
FIRST_PAUSE_S = 4.0
LAST_PAUSE_S = 600.0
FORGIVEN_AFTER_S = 3600.0
LEFT_OUT_AFTER = 3
"""Losses: a machine on a bad link, or one that is still freeing an earlier lease, has fewer."""


class Steadiness:
    """I remember since when each worker is here, and what was lost with it."""

    def __init__(self) -> None:
        self._here_since: dict[PeerId, float] = {}
        self._losses: dict[PeerId, tuple[int, float]] = {}  # how many, the last one's time

    def observe(self, here: Iterable[PeerId], now: float) -> None:
        """These workers, and no others, are here now."""
        self._here_since = {peer: self._here_since.get(peer, now) for peer in here}

    def lost(self, peer: PeerId, now: float) -> None:
        """A deployment ended because of this worker."""
        self._here_since.pop(peer, None)
        self._losses[peer] = (self._losses_of(peer, now) + 1, now)

    def counted_on_at(self, peer: PeerId, now: float) -> float:
        """When the worker, if it stays, may be part of a plan that replaces a running one."""
        return self._here_since.get(peer, now) + _pause_s(self._losses_of(peer, now))

    def is_left_out(self, peer: PeerId, now: float) -> bool:
        """Whether a plan should do without the worker, where it can."""
        losses = self._losses_of(peer, now)
        return losses >= LEFT_OUT_AFTER and now < self._losses[peer][1] + _pause_s(losses)

    def _losses_of(self, peer: PeerId, now: float) -> int:
        count, last = self._losses.get(peer, (0, now))
        return count if now - last < FORGIVEN_AFTER_S else 0


def _pause_s(losses: int) -> float:
    return min(FIRST_PAUSE_S * 2 ** (losses - 1), LAST_PAUSE_S) if losses else SETTLE_S
