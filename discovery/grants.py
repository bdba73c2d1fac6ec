"""Who may do what in a mesh: signed grants, and the rules as tables.

A mesh is the set of peers certified under one root key. A grant names a mesh, a peer, a role, an
expiry and whether its holder may invite further peers. It is signed by the root (depth 1) or by a
holder who may invite (depth 2 and 3) and carries the grants it hangs on, so that anyone who knows
the mesh's root key can check it with nothing else at hand. Rights only shrink along the chain:
the role, the expiry, the right to invite.

`since` is when somebody chose to let the peer in, `issued_at` when this grant was signed. A renewal
moves the second and never the first: what was said against a member (`discovery.revocations`)
holds for every renewal of its grant, also for one by a node that had not heard.

Wire format, all integers big-endian: one byte 0x02, then each grant of the chain, root first:

====== ===== =======================================================
offset bytes field
====== ===== =======================================================
0      32    mesh: Ed25519 public key of its root
32     32    peer: whom the grant is for
64     1     role (`ROLE_CODES`)
65     8     since, unix seconds: when the peer was let in
73     8     issued_at, unix seconds: when this was signed
81     8     expires_at, unix seconds
89     1     may_invite, 0 or 1
90     1     depth, 1 to 3
91     32    issuer: the mesh's key at depth 1, else the peer of the grant before
123    64    signature under `GRANT_LABEL` over the 123 bytes before it
====== ===== =======================================================

Sans-IO: `now` and the signing function come in.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from blake3 import blake3

from tunnels.identity import verify
from tunnels.peer import PeerId

GRANT_LABEL = "mesh grant 2"
GRANT_LIFETIME_S = 180 * 24 * 3600
"""How long a grant holds: long enough for a machine left in a cupboard over a season, short enough
that a forgotten one does not stay a member for ever. A member that connects has it renewed."""
MAX_AHEAD_S = 24 * 3600
"""How far an issuer's clock may be ahead of ours: a wrong time zone, and no more."""
MAX_DEPTH = 3
DIGEST_BYTES = 16

_FORMAT = b"\x02"
_BODY = struct.Struct(">32s32sBQQQBB32s")
_SIGNATURE_BYTES = 64
_LINK_BYTES = _BODY.size + _SIGNATURE_BYTES

Sign = Callable[[str, bytes], bytes]
"""`Identity.sign`: a signature over a payload under a label."""


class GrantError(Exception):
    """A grant does not hold; the sentence says why."""


class GrantExpired(GrantError):
    """The grant, or one it hangs on, is past its time."""


class Role(Enum):
    """What a member is for."""

    PEER = "peer"  # lends and borrows
    WORKER = "worker"  # lends
    ORCHESTRATOR = "orchestrator"  # borrows
    CLIENT = "client"  # HTTP only
    RELAY = "relay"  # carries other peers' traffic, opens nothing


ROLE_CODES = {
    Role.PEER: 1,
    Role.WORKER: 2,
    Role.ORCHESTRATOR: 3,
    Role.CLIENT: 4,
    Role.RELAY: 5,
}
ROLES_BY_CODE = {code: role for role, code in ROLE_CODES.items()}

OPEN_TO_ALL = frozenset({"join", "hello"})
"""Services anyone who has proven a key may open: they are how a stranger becomes a member."""

OPEN_TO_MEMBERS = frozenset({"reserve", "paths", "renew", "revocations", "roster", "webrtc"})
"""Services that keep a mesh together, open to a member of any role."""

SERVICES: dict[Role, frozenset[str]] = {
    Role.PEER: OPEN_TO_MEMBERS | {"control", "rpc/", "push/", "store", "pull", "probe", "http"},
    Role.WORKER: OPEN_TO_MEMBERS | {"push/", "store", "probe"},
    Role.ORCHESTRATOR: OPEN_TO_MEMBERS | {"control", "rpc/", "store", "pull", "probe", "http"},
    Role.CLIENT: OPEN_TO_MEMBERS | {"http"},
    Role.RELAY: OPEN_TO_MEMBERS,
}
"""The services a member of each role may open at another; a name ending in "/" is a prefix."""

LENDERS = frozenset({Role.PEER, Role.WORKER})
"""Roles that are asked for leases."""

COMPUTING = LENDERS | {Role.ORCHESTRATOR}
"""Roles that models are computed with: what is measured for plans is measured between these."""

GRANTABLE: dict[Role, frozenset[Role]] = {
    Role.PEER: frozenset(Role),
    Role.WORKER: frozenset({Role.WORKER}),
    Role.ORCHESTRATOR: frozenset({Role.ORCHESTRATOR, Role.CLIENT}),
    Role.CLIENT: frozenset({Role.CLIENT}),
    Role.RELAY: frozenset({Role.RELAY}),
}
"""The roles a holder of each role may pass on, where it may invite at all: never more rights."""


@dataclass(frozen=True)
class Grant:
    """One peer's place in one mesh. Nothing here is trusted before `verify_grant`."""

    mesh: bytes
    peer: PeerId
    role: Role
    since: int
    issued_at: int
    expires_at: int
    may_invite: bool
    depth: int
    issuer: PeerId
    signature: bytes
    parent: Grant | None = None

    def chain(self) -> tuple[Grant, ...]:
        """This grant and those it hangs on, root first."""
        return (*(self.parent.chain() if self.parent else ()), self)

    def body(self) -> bytes:
        """What the signature covers."""
        return _BODY.pack(
            self.mesh,
            self.peer.key,
            ROLE_CODES[self.role],
            self.since,
            self.issued_at,
            self.expires_at,
            self.may_invite,
            self.depth,
            self.issuer.key,
        )


def may_open(role: Role, service: str) -> bool:
    """Whether a member of this role may open `service` at another member."""
    if service in OPEN_TO_ALL:
        return True
    prefix, slash, rest = service.partition("/")
    name = prefix + slash if rest else service
    return bool(name.endswith("/") == bool(rest)) and name in SERVICES[role]


def issue_root(
    sign_root: Sign, *, mesh: bytes, peer: PeerId, role: Role, issued_at: int, may_invite: bool
) -> Grant:
    """A grant signed by the mesh's root key itself, for the whole of `GRANT_LIFETIME_S`."""
    expires_at = issued_at + GRANT_LIFETIME_S
    draft = Grant(
        mesh, peer, role, issued_at, issued_at, expires_at, may_invite, 1, PeerId(mesh), b""
    )
    return replace(draft, signature=sign_root(GRANT_LABEL, draft.body()))


def issue(
    parent: Grant,
    sign: Sign,
    *,
    peer: PeerId,
    role: Role,
    issued_at: int,
    may_invite: bool,
    since: int | None = None,
) -> Grant:
    """A grant the holder of `parent` gives to `peer`; `sign` is the holder's key.

    since: of the grant that this one renews; left out, the peer is let in now.
    The expiry is cut to the parent's, and the right to invite ends at depth 3. Raises `GrantError`
    when `parent` may not invite, or not into this role.
    """
    depth = parent.depth + 1
    draft = Grant(
        mesh=parent.mesh,
        peer=peer,
        role=role,
        since=issued_at if since is None else since,
        issued_at=issued_at,
        expires_at=min(issued_at + GRANT_LIFETIME_S, parent.expires_at),
        may_invite=may_invite and depth < MAX_DEPTH,
        depth=depth,
        issuer=parent.peer,
        signature=b"",
        parent=parent,
    )
    _check_step(parent, draft)
    return replace(draft, signature=sign(GRANT_LABEL, draft.body()))


def check_may_grant(parent: Grant, role: Role) -> None:
    """Raises `GrantError` unless the holder of `parent` may invite into `role`."""
    if not parent.may_invite or parent.depth >= MAX_DEPTH:
        raise GrantError("the inviter has no right to invite: ask a member who has")
    if role not in GRANTABLE[parent.role]:
        raise GrantError(
            f"a member with the role {parent.role.value} cannot make anyone {role.value}: "
            "ask a member with the role peer"
        )


def renewal_due(grant: Grant, now: float) -> bool:
    """Whether less than half of the grant's time is left."""
    return 2 * (grant.expires_at - now) < grant.expires_at - grant.issued_at


def is_dated_ahead(grant: Grant, now: float) -> bool:
    """Whether it was signed by a clock so far ahead of ours that one of the two must be wrong."""
    return any(link.issued_at > now + MAX_AHEAD_S for link in grant.chain())


def grant_digest(grant: Grant) -> bytes:
    """16 bytes that stand for this very grant with its chain: BLAKE3 of its encoding."""
    return blake3(encode_grant(grant)).digest()[:DIGEST_BYTES]


def verify_grant(grant: Grant, *, mesh: bytes, peer: PeerId, now: float) -> None:
    """Raises `GrantError` unless this grant makes `peer` a member of `mesh` at `now`, as far as a
    grant alone can tell: whether it was revoked is in `discovery.revocations`."""
    verify_chain(grant, mesh=mesh, peer=peer)
    if is_dated_ahead(grant, now):
        raise GrantError(
            "the grant is dated more than a day ahead of this machine's clock: set the clocks of "
            "both machines right"
        )
    if grant.expires_at <= now:
        raise GrantExpired("the grant has expired: join again with a new invite")


def verify_chain(grant: Grant, *, mesh: bytes, peer: PeerId) -> None:
    """Raises `GrantError` unless the grant made `peer` a member of `mesh` at some time."""
    if grant.mesh != mesh:
        raise GrantError("the grant is for another mesh: ask for an invite to this one")
    if grant.peer != peer:
        raise GrantError("the grant was given to another node: each node needs its own invite")
    above: Grant | None = None
    for link in grant.chain():
        if above is None:
            if link.issuer != PeerId(mesh) or link.depth != 1:
                raise GrantError("the grant does not go back to this mesh's root key")
        else:
            _check_step(above, link)
        latest = link.issued_at + GRANT_LIFETIME_S
        if not link.since <= link.issued_at < link.expires_at <= latest:
            raise GrantError("the grant's dates contradict each other: ask for a new invite")
        if not verify(link.issuer, GRANT_LABEL, link.body(), link.signature):
            raise GrantError("a signature on the grant is not its issuer's: ask for a new invite")
        above = link


def _check_step(parent: Grant, child: Grant) -> None:
    """Rights only shrink from `parent` to `child`; else `GrantError`."""
    if child.mesh != parent.mesh or child.issuer != parent.peer or child.depth != parent.depth + 1:
        raise GrantError("the grant's chain is broken: ask for a new invite")
    check_may_grant(parent, child.role)
    if child.expires_at > parent.expires_at:
        raise GrantError("the grant outlasts the one it hangs on: ask for a new invite")
    if child.may_invite and child.depth >= MAX_DEPTH:
        # It could not use the right, but have it renewed higher up, and speak as an inviter.
        raise GrantError("the grant claims a right to invite beyond its depth: ask for a new one")


def encode_grant(grant: Grant) -> bytes:
    """The grant with its chain, as the table above says."""
    return _FORMAT + b"".join(link.body() + link.signature for link in grant.chain())


def parse_grant_untrusted(data: bytes) -> Grant:
    """The grant in `data`, its shape checked and nothing more; raises `GrantError` only."""
    if data[:1] != _FORMAT:
        raise GrantError("the grant is in a format this version of mesh does not know")
    links, rest = divmod(len(data) - 1, _LINK_BYTES)
    if rest or not 1 <= links <= MAX_DEPTH:
        raise GrantError("the grant is damaged: its length is wrong")
    grant: Grant | None = None
    for start in range(1, len(data), _LINK_BYTES):
        grant = _parse_link(data[start : start + _LINK_BYTES], grant)
    assert grant is not None
    return grant


def _parse_link(data: bytes, parent: Grant | None) -> Grant:
    fields = _BODY.unpack_from(data)
    mesh, peer, role, since, issued_at, expires_at, may_invite, depth, issuer = fields
    if role not in ROLES_BY_CODE or may_invite > 1:
        raise GrantError("the grant is damaged, or made by a newer mesh: update this one")
    return Grant(
        mesh=mesh,
        peer=PeerId(peer),
        role=ROLES_BY_CODE[role],
        since=since,
        issued_at=issued_at,
        expires_at=expires_at,
        may_invite=bool(may_invite),
        depth=depth,
        issuer=PeerId(issuer),
        signature=data[_BODY.size :],
        parent=parent,
    )
