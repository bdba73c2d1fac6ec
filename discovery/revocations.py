"""What was taken back: members put out, members who left, invites withdrawn.

A revocation is a statement, signed by its issuer, that every member of a mesh keeps and passes on.
It can be checked with nothing but the mesh's root key at hand: an issuer other than the root shows
its own grant beside it. Whether it is accepted depends on itself alone, never on what was heard
before it, so that all members come to the same view in whatever order they hear.

Rules:

- Who may state what: `MAY_STATE`. `Standing.INVITER` is a member whose grant lets it invite.
- A link of a grant's chain is revoked by a `Kind.PEER` statement about the link's peer whose `at`
  is not before the link's `since`, and whose issuer is the mesh's root, that peer itself, or the
  peer of a link above it.
- A grant holds when its last link is not revoked, and every statement that revokes a link above
  the last one spares this very grant (`grant_digest` in `spared`). So a member that was put out
  takes with it whatever it gave out, also later and under an earlier date, but for the grants
  that were known to whoever put it out.
- Nothing is ever taken back in its turn. A peer is let in again by a grant whose `since` is later
  than what was said about it (`RevocationBook.newest_against`).
- An invite is withdrawn by its inviter (`Kind.INVITE`), who may have lost its own book.

Bounds: `MAX_SPARED` grants in one statement; in one mesh `MAX_BY_ROOT` statements of its root,
`MAX_BY_MEMBER` on the account of one member, `MAX_BY_MEMBERS` of all. What a member says of itself
counts on the account of whoever let it in, who could make up any number of such members. Of two
statements by one issuer about one subject, the one that the other says whole is dropped. A
statement is forgotten at `until`, when all it could void has expired: a `Kind.PEER` one after twice
a grant's lifetime, since a member that had not heard may have renewed such a grant on the last day.

Wire format, all integers big-endian:

====== ===== ======================================================================
offset bytes field
====== ===== ======================================================================
0      1     format, 1
1      32    mesh: Ed25519 public key of its root
33     1     kind (`Kind`)
34     32    subject: the peer, or the invite's id and 24 zeros
66     8     at, unix seconds
74     8     until, unix seconds: at + 2 * `GRANT_LIFETIME_S` for a peer, an invite's expiry
82     32    issuer
114    2     n: how many grants are spared
116    16n   their digests, ascending
..     64    signature under `REVOCATION_LABEL` over all before it
..     0-562 the issuer's grant (`discovery.grants`); nothing where the issuer is the root
====== ===== ======================================================================

Sans-IO: `now` and the signing function come in.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from itertools import pairwise
from typing import Any

from blake3 import blake3

from discovery.grants import (
    DIGEST_BYTES,
    GRANT_LIFETIME_S,
    Grant,
    GrantError,
    Sign,
    encode_grant,
    grant_digest,
    parse_grant_untrusted,
    verify_chain,
)
from discovery.token import ID_BYTES
from tunnels.identity import verify
from tunnels.peer import KEY_BYTES, PeerId

REVOCATION_LABEL = "mesh revocation 1"
REMEMBERED_S = 2 * GRANT_LIFETIME_S
MAX_SPARED = 256
MAX_BY_ROOT = 1024
MAX_BY_MEMBER = 128
MAX_BY_MEMBERS = 1024
LAST_MOMENT = 2**63 - 1
"""Of `at` and `until`: what a file or a database holds without a thought."""

_FORMAT = b"\x01"
_BODY = struct.Struct(">32sB32sQQ32sH")
_SIGNATURE_BYTES = 64
_STATE_FORMAT = 1


class RevocationError(Exception):
    """A revocation that cannot be read, or that its issuer may not state."""


class BookFull(RevocationError):
    """It may hold, and there is no room for it: `Bounds` above."""


class BadRevocationState(Exception):
    """Saved state that no book wrote."""


class Kind(IntEnum):
    """What is taken back; the number is the wire's."""

    PEER = 1  # all grants of a peer up to a moment
    INVITE = 2  # an invite


class Standing(Enum):
    """What an issuer is to the mesh and to its subject."""

    ROOT = "root"
    SELF = "self"
    INVITER = "inviter"


MAY_STATE: dict[Kind, frozenset[Standing]] = {
    Kind.PEER: frozenset({Standing.ROOT, Standing.SELF, Standing.INVITER}),
    Kind.INVITE: frozenset({Standing.INVITER}),
}
"""Which standings let an issuer state a revocation; any one of them is enough."""


@dataclass(frozen=True)
class Revocation:
    """One statement. Nothing here is trusted before `verify_revocation`.

    subject: the peer's key, or an invite's id (8 bytes).
    """

    mesh: bytes
    kind: Kind
    subject: bytes
    at: int
    until: int
    issuer: PeerId
    spared: tuple[bytes, ...] = ()
    signature: bytes = b""
    grant: Grant | None = None
    digest: bytes = field(init=False, compare=False, repr=False)
    """Stands for what is said, whoever passes it on and whichever grant is shown with it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", blake3(self.body()).digest()[:DIGEST_BYTES])

    def body(self) -> bytes:
        """What the signature covers."""
        fixed = _BODY.pack(
            self.mesh,
            self.kind,
            self.subject.ljust(KEY_BYTES, b"\0"),
            self.at,
            self.until,
            self.issuer.key,
            len(self.spared),
        )
        return _FORMAT + fixed + b"".join(self.spared)

    def says_all_of(self, other: Revocation) -> bool:
        """Whether whatever `other` voids is void by this one too."""
        same = (self.mesh, self.kind, self.subject, self.issuer) == (
            other.mesh,
            other.kind,
            other.subject,
            other.issuer,
        )
        reaches = self.at >= other.at and self.until >= other.until
        return same and reaches and set(self.spared) <= set(other.spared)


def revoke_peer(
    sign: Sign,
    *,
    mesh: bytes,
    peer: PeerId,
    issuer: PeerId,
    at: int,
    grant: Grant | None,
    spared: Iterable[Grant] = (),
) -> Revocation:
    """Puts `peer` out of `mesh`. Of more than `MAX_SPARED` grants spared, the first ones are.

    grant: the issuer's, None where the root's key signs.
    """
    digests = sorted({grant_digest(one) for one in list(spared)[:MAX_SPARED]})
    until = at + REMEMBERED_S
    draft = Revocation(mesh, Kind.PEER, peer.key, at, until, issuer, tuple(digests), b"", grant)
    return replace(draft, signature=sign(REVOCATION_LABEL, draft.body()))


def withdraw_invite(sign: Sign, *, id: bytes, at: int, until: int, grant: Grant) -> Revocation:
    """Withdraws the invite `id`, which ends at `until`, of the holder of `grant`."""
    draft = Revocation(grant.mesh, Kind.INVITE, id, at, until, grant.peer, (), b"", grant)
    return replace(draft, signature=sign(REVOCATION_LABEL, draft.body()))


def verify_revocation(revocation: Revocation) -> None:
    """Raises `RevocationError` unless its issuer said so and may."""
    if not _standings(revocation) & MAY_STATE[revocation.kind]:
        raise RevocationError("the revocation's issuer has no right to it")
    body, signature = revocation.body(), revocation.signature
    if not verify(revocation.issuer, REVOCATION_LABEL, body, signature):
        raise RevocationError("the signature on the revocation is not its issuer's")


def _standings(revocation: Revocation) -> frozenset[Standing]:
    issuer, grant = revocation.issuer, revocation.grant
    if issuer.key == revocation.mesh:
        return frozenset({Standing.ROOT})
    if grant is None:
        return frozenset()
    try:
        # Its expiry does not matter: what was said in time holds for whoever hears it late.
        verify_chain(grant, mesh=revocation.mesh, peer=issuer)
    except GrantError:
        return frozenset()
    standings = {Standing.INVITER} if grant.may_invite else set()
    if revocation.subject == issuer.key:
        standings.add(Standing.SELF)
    return frozenset(standings)


def encode_revocation(revocation: Revocation) -> bytes:
    """The statement as the table above says."""
    grant = b"" if revocation.grant is None else encode_grant(revocation.grant)
    return revocation.body() + revocation.signature + grant


def parse_revocation_untrusted(data: bytes) -> Revocation:
    """The statement in `data`, its shape checked and nothing more; raises `RevocationError`
    only."""
    if data[:1] != _FORMAT or len(data) < 1 + _BODY.size:
        raise RevocationError("the revocation is in a format this version of mesh does not know")
    mesh, kind, padded, at, until, issuer, count = _BODY.unpack_from(data, 1)
    start = 1 + _BODY.size
    signed_end = start + count * DIGEST_BYTES
    end = signed_end + _SIGNATURE_BYTES
    if count > MAX_SPARED or len(data) < end or kind not in set(Kind):
        raise RevocationError("the revocation is damaged, or made by a newer mesh")
    spared = tuple(data[n : n + DIGEST_BYTES] for n in range(start, signed_end, DIGEST_BYTES))
    subject = padded if kind == Kind.PEER else padded[:ID_BYTES]
    ordered = all(one < other for one, other in pairwise(spared))
    dated = at <= until <= LAST_MOMENT and (kind != Kind.PEER or until == at + REMEMBERED_S)
    if not ordered or not dated or subject.ljust(KEY_BYTES, b"\0") != padded:
        raise RevocationError("the revocation is damaged: it is not in its one canonical form")
    try:
        grant = parse_grant_untrusted(data[end:]) if data[end:] else None
    except GrantError as error:
        raise RevocationError(f"the revocation's issuer shows a bad grant: {error}") from None
    return Revocation(
        mesh, Kind(kind), subject, at, until, PeerId(issuer), spared, data[signed_end:end], grant
    )


class RevocationBook:
    """I keep what was taken back in the meshes of one node, and say which grants that voids."""

    def __init__(self) -> None:
        self._said: dict[tuple[bytes, bytes], list[Revocation]] = {}
        self._by_digest: dict[bytes, Revocation] = {}

    def add(self, revocation: Revocation, now: float) -> bool:
        """Takes a statement of anyone's. Says whether it is news; raises `RevocationError`."""
        about = self._said.get((revocation.mesh, revocation.subject), [])
        if revocation.until <= now or self.knows(revocation):
            return False
        verify_revocation(revocation)
        obsolete = [one for one in about if revocation.says_all_of(one)]
        self._check_room(revocation, len(obsolete))
        for one in obsolete:
            self._drop(one)
        self._enter(revocation)
        return True

    def knows(self, revocation: Revocation) -> bool:
        """Whether what we keep says all of this already."""
        about = self._said.get((revocation.mesh, revocation.subject), ())
        return any(one.says_all_of(revocation) for one in about)

    def void_by(self, grant: Grant) -> Revocation | None:
        """What voids this grant, or None where it holds, as far as we have heard."""
        chain = grant.chain()
        issuers = {PeerId(grant.mesh)}
        for link in chain:
            issuers.add(link.peer)
            for said in self._about_peer(grant.mesh, link.peer):
                revoked = said.at >= link.since and said.issuer in issuers
                if revoked and (link is grant or grant_digest(grant) not in said.spared):
                    return said
        return None

    def newest_against(self, peer: PeerId, parent: Grant) -> int:
        """The latest moment at which `peer` was put out, for grants that hang on `parent`; 0 for
        never. A grant that is to hold has a later `since`."""
        issuers = _above(parent) | {peer}
        about = self._about_peer(parent.mesh, peer)
        return max((said.at for said in about if said.issuer in issuers), default=0)

    def removed_at(self, peer: PeerId, parent: Grant) -> int:
        """The same, but for what the peer said of itself: who left may come back as it was."""
        issuers = _above(parent) - {peer}
        about = self._about_peer(parent.mesh, peer)
        return max((said.at for said in about if said.issuer in issuers), default=0)

    def newest_removal(self, parent: Grant) -> int:
        """The latest moment at which anyone was put out of grants that hang on `parent`."""
        issuers = _above(parent)
        said = (one for one in self.of_mesh(parent.mesh) if one.kind is Kind.PEER)
        return max((one.at for one in said if one.issuer in issuers), default=0)

    def withdrawn(self, inviter: PeerId) -> tuple[Revocation, ...]:
        """The invites that `inviter` has withdrawn, in any mesh."""
        every = self._by_digest.values()
        return tuple(one for one in every if one.kind is Kind.INVITE and one.issuer == inviter)

    def of_mesh(self, mesh: bytes) -> tuple[Revocation, ...]:
        """All that is kept of one mesh, the oldest first."""
        found = [one for one in self._by_digest.values() if one.mesh == mesh]
        return tuple(sorted(found, key=lambda one: (one.at, one.digest)))

    def expire(self, now: float) -> int:
        """Forgets what can void nothing any more; says how many."""
        gone = [one for one in self._by_digest.values() if one.until <= now]
        for one in gone:
            self._drop(one)
        return len(gone)

    def to_state(self) -> dict[str, Any]:
        """Plain JSON values."""
        said = [encode_revocation(one).hex() for one in self._by_digest.values()]
        return {"format": _STATE_FORMAT, "revocations": said}

    @classmethod
    def from_state_untrusted(cls, state: object) -> RevocationBook:
        """The book `to_state` gave; raises `BadRevocationState` and nothing else."""
        book = cls()
        try:
            if not isinstance(state, Mapping) or state["format"] != _STATE_FORMAT:
                raise BadRevocationState("the saved revocations are in a format not known here")
            for text in state["revocations"]:
                revocation = parse_revocation_untrusted(bytes.fromhex(text))
                verify_revocation(revocation)
                book._enter(revocation)
        except (KeyError, TypeError, ValueError, RevocationError) as error:
            raise BadRevocationState("the saved revocations are damaged") from error
        return book

    def _about_peer(self, mesh: bytes, peer: PeerId) -> list[Revocation]:
        said = self._said.get((mesh, peer.key), ())
        return [one for one in said if one.kind is Kind.PEER]

    def _check_room(self, revocation: Revocation, freed: int) -> None:
        """Raises `RevocationError` where the account it counts on is full."""
        account = _account(revocation)
        accounts = [_account(one) for one in self.of_mesh(revocation.mesh)]
        root = PeerId(revocation.mesh)
        by_root, ours = accounts.count(root), accounts.count(account) - freed
        limit = MAX_BY_ROOT if account == root else MAX_BY_MEMBER
        by_members = len(accounts) - by_root - freed
        if ours >= limit or (account != root and by_members >= MAX_BY_MEMBERS):
            raise BookFull("too many revocations are kept of this mesh already")

    def _enter(self, revocation: Revocation) -> None:
        about = self._said.setdefault((revocation.mesh, revocation.subject), [])
        about.append(revocation)
        self._by_digest[revocation.digest] = revocation

    def _drop(self, revocation: Revocation) -> None:
        key = (revocation.mesh, revocation.subject)
        self._said[key].remove(revocation)
        if not self._said[key]:
            del self._said[key]
        del self._by_digest[revocation.digest]


def _above(parent: Grant) -> frozenset[PeerId]:
    """Whose word against a member counts, when its grant hangs on `parent`."""
    return frozenset({PeerId(parent.mesh), *(link.peer for link in parent.chain())})


def _account(revocation: Revocation) -> PeerId:
    """Whose number of statements it adds to."""
    grant = revocation.grant
    said_of_itself = revocation.subject == revocation.issuer.key
    return grant.issuer if grant is not None and said_of_itself else revocation.issuer
