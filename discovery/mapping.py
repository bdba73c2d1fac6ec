"""What a gateway gave, whether it can be of use, and whether the gateway still knows of it.

Sans-IO. Times are seconds of whatever clock the caller has.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import Enum

LIFETIME_S = 3600  # asked for; half of what is granted later, it is asked for again
MIN_RENEWAL_S = 30.0  # a gateway that grants seconds is not asked without end
MAX_RENEWAL_S = LIFETIME_S / 2
EPOCH_SLACK_S = 2
_CARRIER = ipaddress.ip_network("100.64.0.0/10")


class Transport(Enum):
    """What is mapped. The values are IANA's protocol numbers."""

    TCP = 6
    UDP = 17


@dataclass(frozen=True)
class Mapping:
    """What the gateway does: `host:port` on its outside leads to `internal_port` of ours.

    lifetime_s: 0 for one without an end (UPnP of old routers).
    """

    transport: Transport
    internal_port: int
    host: str
    port: int
    lifetime_s: int

    @property
    def renew_after_s(self) -> float:
        """RFC 6887 section 11.2.1: at half of its life."""
        lifetime_s = self.lifetime_s or LIFETIME_S
        return min(max(lifetime_s / 2, MIN_RENEWAL_S), MAX_RENEWAL_S)


def uselessness(host: str) -> str | None:
    """Why nobody beyond the gateway can reach its outside address `host`; None when they can."""
    address = ipaddress.ip_address(host)
    if address.version != 4 or address.is_unspecified:
        return "the router has no IPv4 address on its outside: it may be offline"
    if address in _CARRIER:
        return (
            f"the router's own address {host} is shared by the provider (double NAT, CGNAT): ask "
            "the provider for a public one, or use a relay"
        )
    if address.is_private:
        return (
            f"the router's own address {host} is private, so another router is before it (double "
            "NAT): map the port there too, or let the inner one be a bridge"
        )
    if not address.is_global or address.is_multicast:
        return f"the router says that its outside address is {host}, which nobody can reach"
    return None


class Epoch:
    """I tell from a gateway's own clock whether it has forgotten what it gave (RFC 6887 section
    8.5, which also bears with the coarser clocks of NAT-PMP)."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None  # its time, our time

    def has_restarted(self, epoch_s: int, now: float) -> bool:
        """epoch_s: the gateway's time in the answer that came now. Says so once."""
        last, self._last = self._last, (epoch_s, now)
        if last is None:
            return False
        theirs_s, ours_s = epoch_s - last[0], now - last[1]
        if theirs_s < -1:
            return True
        slow = theirs_s + EPOCH_SLACK_S < ours_s - ours_s / 16
        fast = ours_s + EPOCH_SLACK_S < theirs_s - theirs_s / 16
        return slow or fast
