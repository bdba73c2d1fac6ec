"""Ways through relays on which something came that the peer had not sent. Sans-IO.

The relay may have altered it, or the peer may want us to think so: so it is this peer through this
relay that is not tried for a while, ever longer, and nobody else.
"""

from __future__ import annotations

from collections import OrderedDict

from tunnels.errors import LinkClosed
from tunnels.peer import PeerId

MAX_SUSPECTED = 256
FIRST_PAUSE_S = 60.0
LAST_PAUSE_S = 3600.0


class Suspicions:
    """I remember which peers are not sought through which relays for now."""

    def __init__(self) -> None:
        self._until: OrderedDict[tuple[PeerId, PeerId], tuple[float, float]] = OrderedDict()
        self._told: set[PeerId] = set()

    def check(self, relay: PeerId, peer: PeerId, now: float) -> None:
        """Raises LinkClosed."""
        until_s, _ = self._until.get((relay, peer), (0.0, 0.0))
        if now < until_s:
            raise LinkClosed(
                f"not tried: what came from there through the relay {relay.short} was altered; "
                f"it is tried again in {until_s - now:.0f} s"
            )

    def add(self, relay: PeerId, peer: PeerId, now: float) -> bool:
        """Says whether it is the first about this relay."""
        until_s, pause_s = self._until.pop((relay, peer), (0.0, FIRST_PAUSE_S / 2))
        if now >= until_s:  # several connections of one link tell of it
            pause_s = min(2 * pause_s, LAST_PAUSE_S)
            until_s = now + pause_s
        self._until[relay, peer] = until_s, pause_s
        while len(self._until) > MAX_SUSPECTED:
            self._until.popitem(last=False)
        is_first = relay not in self._told and len(self._told) < MAX_SUSPECTED
        self._told |= {relay} if is_first else set()
        return is_first
