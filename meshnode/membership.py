"""Who belongs to which mesh: joining by token, introducing, allowing.

Two services carry it, both open to anyone who has proven a key (`tunnels.handshake`):

- `join`: the joiner shows a token's id and secret, the inviter burns a use and answers with a
  signed grant. The secret travels inside the tunnel to the inviter's pinned key, nowhere else.
- `hello`: both sides show the grants of the meshes they share, their names and addresses. The
  dialler shows those of meshes that the peer has proven before, or that its token names. Only
  after it does `authorize` let the peer open anything else, on that session.

State on disk: `root.key` (the mesh this node founded), `membership.json` (our grants, the members
we know and the meshes each has proven), `invites.json` (hashes of secrets, uses left).
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import trio

from discovery.grants import (
    GRANT_LIFETIME_S,
    Grant,
    GrantError,
    Role,
    encode_grant,
    issue,
    issue_root,
    may_open,
    parse_grant_untrusted,
    verify_grant,
)
from discovery.invites import BadInviteState, InviteBook, InviteRefused
from discovery.roster import BadRosterState, Member, Roster
from discovery.token import ID_BYTES, SECRET_BYTES, Secret, Token, encode
from meshnode.crash_points import reached
from meshnode.errors import AccessError, BadMessage, NetworkError
from meshnode.introduction import (
    MAX_CANDIDATES,
    MAX_HELLO_GRANTS,
    parse_grants_untrusted,
    parse_member_untrusted,
)
from meshnode.messages import MessageStream
from meshnode.state import Home
from tunnels import Candidate, Identity, PeerId, Session, Stream
from tunnels.errors import BadFrame
from tunnels.frames import clip_reason
from tunnels.peer import parse_peer_id_untrusted

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0
SEEN_SAVED_EVERY_S = 24 * 3600
"""How stale the moments on disk at which members were heard may grow: they count in weeks."""

_GRANTS = "membership.json"
_INVITES = "invites.json"
_WRONG_SHAPE = (KeyError, TypeError, ValueError, AttributeError)


@dataclass
class _Acquaintance:
    """What a peer has shown on one session, and whether it has checked what we showed."""

    session: Session | None
    grants: dict[bytes, Grant]
    introduced: bool = False


class Membership:
    """I know our meshes and their members, and say who may open what."""

    def __init__(self, home: Home, identity: Identity, name: str) -> None:
        self.name = name
        self.changed = trio.Event()
        self.present_session: Callable[[PeerId], Session | None] = lambda _peer: None
        self.on_introduced: Callable[[PeerId], None] = lambda _peer: None
        self._home = home
        self._identity = identity
        self._root = home.identity("root.key")
        self._book = self._load_book()
        self._book_on_disk = self._book.to_state()
        self._grants: dict[bytes, Grant] = {}
        self._roster = Roster()
        self._proven: dict[PeerId, set[bytes]] = {}
        self._seen_saved_at = 0.0
        self._load_meshes()
        self._roster.expire(time.time())
        self._acquaintances: dict[PeerId, _Acquaintance] = {}
        if self._root.peer.key not in self._grants:
            self._found()

    # -- what others ask ----------------------------------------------------------------------

    @property
    def own_mesh(self) -> bytes:
        return self._root.peer.key

    def authorize(self, peer: PeerId, service: str) -> bool:
        """Whether `peer`, as introduced on its present session, may open `service` here."""
        if service in ("join", "hello"):
            return True
        now = time.time()
        grants = self._shown_by(peer).values()
        return any(grant.expires_at > now and may_open(grant.role, service) for grant in grants)

    def is_introduced(self, peer: PeerId) -> bool:
        """Whether both sides know each other's grants, so that we may open services there."""
        known = self._acquaintances.get(peer)
        return (
            known is not None and known.introduced and known.session is self.present_session(peer)
        )

    def roles(self, peer: PeerId) -> frozenset[Role]:
        return frozenset(grant.role for grant in self._shown_by(peer).values())

    def _shown_by(self, peer: PeerId) -> Mapping[bytes, Grant]:
        """The peer's grants by mesh. What another session showed is void: the peer restarted."""
        known = self._acquaintances.get(peer)
        if known is None or known.session is not self.present_session(peer):
            return {}
        return known.grants

    def member(self, peer: PeerId) -> Member | None:
        return self._roster.get(peer)

    def members(self) -> tuple[Member, ...]:
        return self._roster.members()

    def member_name(self, peer: PeerId) -> str:
        member = self._roster.get(peer)
        return member.name if member else peer.short

    def role_in(self, mesh: bytes) -> Role | None:
        """Our own role in `mesh`; None where we hold no grant that is still good."""
        grant = self._grants.get(mesh)
        return grant.role if grant is not None and grant.expires_at > time.time() else None

    def forget_session(self, session: Session) -> bool:
        """The session ended: the peer introduces itself again on the next. Says whether it was
        introduced on this one."""
        known = self._acquaintances.get(session.peer)
        if known is None or known.session is not session:
            return False
        del self._acquaintances[session.peer]
        if known.introduced:
            self._notify()
        return known.introduced

    # -- inviting -----------------------------------------------------------------------------

    def invite(
        self, candidates: Iterable[Candidate], *, role: Role, lifetime_s: int, uses: int
    ) -> Token:
        """A new token for the mesh this node founded; only its secret's hash is kept.

        `ValueError` for a lifetime or uses that no token can carry; the book is as before then.
        """
        token = Token(
            mesh=self.own_mesh,
            inviter=self._identity.peer,
            id=secrets.token_bytes(ID_BYTES),
            secret=Secret(secrets.token_bytes(SECRET_BYTES)),
            role=role,
            expires_at=int(time.time()) + lifetime_s,
            uses=uses,
            candidates=tuple(candidates)[:MAX_CANDIDATES],
        )
        encode(token)
        self._book.forget_expired(time.time())
        self._book.create(
            token.id, token.secret, role=role, expires_at=token.expires_at, uses=token.uses
        )
        self._save_book()
        return token

    async def serve_join(self, stream: Stream) -> None:
        """The inviter's side of `join`."""
        with _patience(stream):
            messages = MessageStream(stream)
            request = await messages.receive_untrusted()
            try:
                grant = self._redeem(stream.peer, request)
            except (InviteRefused, GrantError) as refusal:
                await messages.send({"refused": str(refusal)})
            else:
                await messages.send({"grant": encode_grant(grant)})
            await stream.send_eof()

    def _redeem(self, peer: PeerId, request: Mapping[str, Any]) -> Grant:
        invite_id, secret = request.get("id"), request.get("secret")
        if not (isinstance(invite_id, bytes) and isinstance(secret, bytes)):
            raise BadMessage("the peer's request to join has an unknown shape")
        if len(secret) != SECRET_BYTES:
            raise BadMessage("the peer's request to join has an unknown shape")
        redemption = self._book.redeem(invite_id, Secret(secret), peer, time.time())
        reached("join.burned")
        self._save_book()  # burned for good before the grant leaves
        reached("join.saved")
        own = self._grants[self.own_mesh]
        return issue(
            own,
            self._identity.sign,
            peer=peer,
            role=redemption.role,
            expires_at=int(time.time()) + GRANT_LIFETIME_S,
            may_invite=redemption.role is Role.PEER,
        )

    # -- joining ------------------------------------------------------------------------------

    async def redeem_token(self, session: Session, token: Token) -> None:
        """Shows the token to its inviter and keeps the grant. Raises `AccessError`."""
        with trio.fail_after(HELLO_TIMEOUT_S):
            async with await session.open("join") as stream:
                messages = MessageStream(stream)
                await messages.send({"id": token.id, "secret": token.secret.reveal()})
                reached("join.asked")
                answer = await messages.receive_untrusted()
        if isinstance(answer.get("refused"), str):
            raise AccessError(f"the invite was refused: {clip_reason(answer['refused'])}")
        data = answer.get("grant")
        if not isinstance(data, bytes):
            raise BadMessage("the inviter's answer has an unknown shape")
        try:
            grant = parse_grant_untrusted(data)
            verify_grant(grant, mesh=token.mesh, peer=self._identity.peer, now=time.time())
        except GrantError as error:
            raise AccessError(f"the inviter's grant does not hold: {error}") from None
        reached("join.granted")
        self._grants[grant.mesh] = grant
        self._save_meshes()

    async def introduce(
        self, session: Session, candidates: Iterable[Candidate], meshes: Iterable[bytes] = ()
    ) -> None:
        """The dialler's side of `hello`. Shows our grants in `meshes`, such as a token's, and in
        those the peer has proven before. Raises `AccessError` when we share no mesh."""
        shown = {*meshes, *self._proven.get(session.peer, ())}
        with trio.fail_after(HELLO_TIMEOUT_S):
            async with await session.open("hello") as stream:
                messages = MessageStream(stream)
                await messages.send(self._hello(candidates, shown))
                answer = await messages.receive_untrusted()
                if not self._accept_hello(session.peer, session, answer):
                    raise AccessError(
                        f"the node {session.peer.short} knows no mesh that this node belongs to: "
                        "ask it for an invite (`mesh invite`)"
                    )
                await messages.send({"ok": True})
        self._now_introduced(session.peer, session)

    async def serve_hello(self, stream: Stream, candidates: Iterable[Candidate]) -> None:
        """The listener's side: only grants of meshes the peer has proven are shown.

        The peer may open services as soon as it has shown its grants; we may, once it has checked
        ours, which is what its last message says.
        """
        session = self.present_session(stream.peer)  # the one that brought this stream
        with _patience(stream):
            messages = MessageStream(stream)
            hello = await messages.receive_untrusted()
            shared = self._accept_hello(stream.peer, session, hello)
            await messages.send(self._hello(candidates, shared))
            await stream.send_eof()
            if shared and await messages.receive_or_end_untrusted() is not None:
                self._now_introduced(stream.peer, session)

    def _hello(self, candidates: Iterable[Candidate], meshes: Iterable[bytes]) -> dict[str, Any]:
        shown = sorted(mesh for mesh in meshes if self.role_in(mesh))[:MAX_HELLO_GRANTS]
        return {
            "name": self.name,
            "seq": int(time.time() * 1000),
            "candidates": [[c.transport, c.host, c.port] for c in candidates],
            "grants": [encode_grant(self._grants[mesh]) for mesh in shown],
        }

    def _accept_hello(
        self, peer: PeerId, session: Session | None, message: Mapping[str, Any]
    ) -> frozenset[bytes]:
        """The meshes that the peer has proven to share with us; none leaves all as it was."""
        verified = self._verify_grants(peer, parse_grants_untrusted(message))
        if verified:
            word = parse_member_untrusted(peer, message, time.time())
            known = self._acquaintances.get(peer)
            if known is not None and known.session is session:
                known.grants = verified
            else:
                self._acquaintances[peer] = _Acquaintance(session, verified)
            self._remember(word, verified)
        return frozenset(verified)

    def _verify_grants(self, peer: PeerId, grants: Iterable[Grant]) -> dict[bytes, Grant]:
        verified = {}
        for grant in grants:
            if grant.mesh not in self._grants:
                continue
            try:
                verify_grant(grant, mesh=grant.mesh, peer=peer, now=time.time())
            except GrantError as error:
                log.warning("grant of %s does not hold: %s", peer.short, error)
                continue
            verified[grant.mesh] = grant
        return verified

    def _remember(self, word: Member, proven: Iterable[bytes]) -> None:
        """Enters a member's word. The disk is only written for news: each write is a flush."""
        now = time.time()
        for peer in filter(self.is_introduced, self._acquaintances):
            self._roster.saw(peer, now)
        gone = self._roster.expire(now)
        news = self._roster.merge(word)
        meshes = self._proven.setdefault(word.peer, set())
        news |= not meshes.issuperset(proven)
        meshes.update(proven)
        if news or gone or now - self._seen_saved_at > SEEN_SAVED_EVERY_S:
            self._save_meshes()

    def _now_introduced(self, peer: PeerId, session: Session | None) -> None:
        known = self._acquaintances.get(peer)
        if known is None or known.session is not session or known.introduced:
            return
        known.introduced = True
        self._notify()
        self.on_introduced(peer)

    def _notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    # -- state on disk ------------------------------------------------------------------------

    def _found(self) -> None:
        """This node's own mesh: its root key certifies it as the first member."""
        self._grants[self.own_mesh] = issue_root(
            self._root.sign,
            mesh=self.own_mesh,
            peer=self._identity.peer,
            role=Role.PEER,
            expires_at=int(time.time()) + 100 * GRANT_LIFETIME_S,
            may_invite=True,
        )
        self._save_meshes()

    def _load_book(self) -> InviteBook:
        state = self._home.load_json(_INVITES)
        if state is None:
            return InviteBook()
        try:
            return InviteBook.from_state_untrusted(state)
        except BadInviteState as error:
            raise self._home.damaged(_INVITES) from error

    def _save_book(self) -> None:
        """Writes what the disk does not hold yet: also what an earlier try failed to write."""
        state = self._book.to_state()
        if state != self._book_on_disk:
            self._home.save_json(_INVITES, state)
            self._book_on_disk = state

    def _load_meshes(self) -> None:
        state = self._home.load_json(_GRANTS)
        if state is None:
            return
        try:
            for text in state["grants"]:
                grant = parse_grant_untrusted(bytes.fromhex(text))
                self._grants[grant.mesh] = grant
            self._roster = Roster.from_state_untrusted(state["roster"])
            for peer, meshes in state.get("proven", {}).items():
                proven = {bytes.fromhex(mesh) for mesh in meshes}
                self._proven[parse_peer_id_untrusted(peer)] = proven
        except (GrantError, BadRosterState, BadFrame, *_WRONG_SHAPE) as error:
            raise self._home.damaged(_GRANTS) from error

    def _save_meshes(self) -> None:
        grants = [encode_grant(grant).hex() for grant in self._grants.values()]
        kept = {member.peer for member in self._roster.members()}
        self._proven = {peer: meshes for peer, meshes in self._proven.items() if peer in kept}
        proven = {str(peer): sorted(map(bytes.hex, self._proven[peer])) for peer in self._proven}
        self._home.save_json(
            _GRANTS, {"grants": grants, "roster": self._roster.to_state(), "proven": proven}
        )
        self._seen_saved_at = time.time()


@contextlib.contextmanager
def _patience(stream: Stream) -> Iterator[None]:
    """Bounds a conversation that anyone may open: in time, and in what its failure costs us."""
    with trio.move_on_after(HELLO_TIMEOUT_S) as deadline:
        try:
            yield
        except NetworkError as error:
            log.info("%s of %s failed: %s", stream.service, stream.peer.short, error)
            stream.reset(str(error))
    if deadline.cancelled_caught:
        stream.reset(f"nothing was said for {HELLO_TIMEOUT_S:.0f} s")
