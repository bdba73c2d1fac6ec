"""Members of one mesh hear nothing of another: a way through a relay names a member of a mesh."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from meshnode.ledger import Ledger
from tunnels import Candidate


def fit_for(
    ledger: Ledger, candidates: Iterable[Candidate], meshes: Collection[bytes]
) -> tuple[Candidate, ...]:
    """Those of our candidates that members of `meshes` may hear: through relays that are members
    in each of these, since who hears of a node in one mesh passes it on in the others."""
    us = ledger.identity.peer
    return tuple(
        one
        for one in candidates
        if one.via in (None, us)
        or (meshes and all(ledger.members.shown(mesh, one.via) is not None for mesh in meshes))
    )


def fit_for_all(ledger: Ledger, candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Those that members of any mesh of ours may hear. Our own counts once it has any."""
    own = ledger.own_mesh
    return fit_for(
        ledger,
        candidates,
        [mesh for mesh in ledger.meshes() if mesh != own or ledger.members.of_mesh(mesh)],
    )
