"""Which members a node keeps a session with. Sans-IO.

A session costs both sides about 24 bytes a second while nobody uses it, and each side's patience
for it. In a mesh of up to ALL_UP_TO others everybody keeps one with everybody. In a larger one a
node keeps

    needed    whom it works with or may have to at once: lenders where it borrows, who renews its
              grant when that is due, a relay or two
    drawn     DRAWN others, by a lot of its own

and those that others keep with it. Graphs in which each draws two or more are connected with a
probability that goes to one (Fenner and Frieze, 1982), and news needs a step for each doubling of
the reach. The lot hangs on a secret that nobody else has: else a member could choose its key so
that it becomes everybody's neighbour, and then stand between them.

A member that does not answer stands in nobody's way: another is drawn, and of those that failed
the SPARE longest not tried are tried again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from blake3 import blake3

from tunnels.peer import PeerId

ALL_UP_TO = 16
DRAWN = 4
SPARE = 4
SECRET_BYTES = 32


def draw(peers: Iterable[PeerId], secret: bytes) -> list[PeerId]:
    """The peers in the order of this node's lot: the same for the same secret, of 32 bytes."""
    return sorted(peers, key=lambda peer: blake3(peer.key, key=secret).digest(16))


def neighbourhood(
    others: Collection[PeerId],
    *,
    needed: Collection[PeerId],
    failed: Mapping[PeerId, float],
    secret: bytes,
) -> frozenset[PeerId]:
    """Whom to keep a session with. failed: when those who do not answer were last tried."""
    if len(others) <= ALL_UP_TO:
        return frozenset(others)
    well = [peer for peer in draw(others, secret) if peer not in failed]
    ill = sorted((peer for peer in others if peer in failed), key=lambda peer: failed[peer])
    return frozenset({*well[:DRAWN], *ill[:SPARE], *(peer for peer in needed if peer in others)})
