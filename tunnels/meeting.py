"""What two sides know before they punch, however they came to know it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from tunnels.binding import Address
from tunnels.handshake import Role
from tunnels.peer import Candidate, NatKind


@dataclass(frozen=True)
class Nats:
    """The kinds of the NATs before one side."""

    v4: NatKind = NatKind.UNKNOWN
    v6: NatKind = NatKind.UNKNOWN


def nats_told_by(candidates: Iterable[Candidate]) -> Nats:
    """What a peer's candidates say of the NATs before it."""
    hard = {6 if ":" in one.host else 4 for one in candidates if one.kind == "hard"}
    v4, v6 = (NatKind.HARD if version in hard else NatKind.UNKNOWN for version in (4, 6))
    return Nats(v4, v6)


@dataclass(frozen=True)
class Meeting:
    """Two sides that send to each other at the same time.

    key: 32 bytes that only the two know. role: the dialler's side chooses among ways that work, and
    dials. addresses: the other side's, the likeliest first; they are held against the policy before
    anything goes there. patience_s: how long to wait for the other side to begin, where that is
    not agreed: somebody has to carry a code there first. begins_in_s: until the moment when both
    begin: half a round trip for the side that spoke last.
    """

    key: bytes = field(repr=False)
    role: Role
    addresses: tuple[Address, ...]
    mine: Nats = Nats()
    theirs: Nats = Nats()
    patience_s: float = 0.0
    begins_in_s: float = 0.0


Punch = Callable[[Meeting], Awaitable[Address]]
"""Where the peer's datagrams come from, once both have punched. Raises TunnelError."""
