"""Who may open what here, now: what each peer has shown on its present session.

The rooms around: `ledger` (what is known and kept), `joining` (a stranger becomes a member),
`introducing` (members show each other their grants), `removal` (what is taken back is passed on),
`renewal` (grants that run out are signed anew), `administration` (what the commands ask for).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import trio

from discovery.grants import OPEN_TO_ALL, Grant, GrantError, Role, may_open
from discovery.revocations import Revocation
from discovery.roster import Member
from meshnode.errors import MeshError, NetworkError
from meshnode.events import Emit, Event, Kind
from meshnode.ledger import GrantRevoked, Ledger
from meshnode.own_record import OwnRecord
from meshnode.state import Home
from tunnels import Identity, PeerId, Session, Stream
from tunnels.allowance import Buckets, Rate

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0
PUSHED = "push/"
"""What a role opens in principle, and a lease for one peer (`pipeline.pushing`)."""
HEARING = Rate(per_s=0.03, burst=0.3)
"""Seconds a second. A thousand statements cost a quarter of one, and so do the manifests of 50,000
tensors; whoever has more to say is heard to the end, slowly."""


@dataclass
class Acquaintance:
    """What a peer has shown on one session, and whether it has checked what we showed.

    told: digests of the revocations that both of us know. parting: the session is about to end.
    """

    peer: PeerId
    session: Session | None
    grants: dict[bytes, Grant]
    introduced: bool = False
    told: set[bytes] = field(default_factory=set)
    parting: bool = False


class Membership:
    """I know our meshes and their members, and say who may open what."""

    def __init__(
        self,
        home: Home,
        identity: Identity,
        name: str,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self.ledger = Ledger(home, identity, wall_clock)
        self.record = OwnRecord(self.ledger, lambda: self.name)
        self.changed = trio.Event()  # somebody came or went
        self.news = trio.Event()  # something was taken back
        self.present_session: Callable[[PeerId], Session | None] = lambda _peer: None
        self.on_introduced: Callable[[PeerId], None] = lambda _peer: None
        self.emit: Emit = lambda _event: None
        self.may_push: Callable[[PeerId, str], bool] = lambda _peer, _lease: False
        """Whether the owner of that lease of ours has named that peer as the one that pushes."""
        self.hearing = Hearing()
        self._acquaintances: dict[PeerId, Acquaintance] = {}

    # -- what others ask ----------------------------------------------------------------------

    def authorize(self, peer: PeerId, service: str) -> bool:
        """Whether `peer`, as introduced on its present session, may open `service` here."""
        if service in OPEN_TO_ALL:
            return True
        if not any(may_open(grant.role, service) for grant in self.shown_by(peer).values()):
            return False
        lease = service.removeprefix(PUSHED)
        return lease == service or self.may_push(peer, lease)

    def is_introduced(self, peer: PeerId) -> bool:
        """Whether both sides know each other's grants, so that we may open services there."""
        known = self._acquaintances.get(peer)
        return known is not None and known.introduced and bool(self.shown_by(peer))

    def roles(self, peer: PeerId) -> frozenset[Role]:
        return frozenset(grant.role for grant in self.shown_by(peer).values())

    def shown_by(self, peer: PeerId) -> Mapping[bytes, Grant]:
        """The peer's good grants by mesh, where we are a member too. What another session showed
        is void: the peer restarted."""
        known = self._acquaintances.get(peer)
        if known is None or not self.is_present(known):
            return {}
        ledger = self.ledger
        return {
            mesh: grant
            for mesh, grant in known.grants.items()
            if ledger.why_void(grant) is None and ledger.grant(mesh) is not None
        }

    def share_mesh(self, peer: PeerId, asker: PeerId) -> bool:
        """Whether the peer is in a mesh that the asker has shown a grant of."""
        members, shared = self.ledger.members, self.shown_by(asker)
        return any(members.shown(mesh, peer) for mesh in members.proven(peer) & shared.keys())

    def member(self, peer: PeerId) -> Member | None:
        return self.ledger.members.roster.get(peer)

    def members(self) -> tuple[Member, ...]:
        return self.ledger.members.roster.members()

    def member_name(self, peer: PeerId) -> str:
        if peer == self.ledger.identity.peer:
            return self.name
        member = self.ledger.members.roster.get(peer)
        return member.name if member else peer.short

    def mesh_name(self, mesh: bytes) -> str:
        """A mesh goes by the name of its founder, as far as we have met it."""
        if mesh == self.ledger.own_mesh:
            return f"{self.name}'s mesh"
        places = (self.ledger.own_place(mesh), *self.ledger.members.of_mesh(mesh))
        founders = {place.chain()[0].peer for place in places if place is not None}
        known = [self.member_name(one) for one in sorted(founders) if self.member(one)]
        return f"{known[0]}'s mesh" if known else f"the mesh {PeerId(mesh).short}"

    def role_in(self, mesh: bytes) -> Role | None:
        """Our own role in `mesh`; None where we hold no grant that is still good."""
        grant = self.ledger.grant(mesh)
        return None if grant is None else grant.role

    # -- acquaintances ------------------------------------------------------------------------

    def acquaintances(self) -> list[Acquaintance]:
        """Those whose session is the present one."""
        return [known for known in self._acquaintances.values() if self.is_present(known)]

    def is_present(self, known: Acquaintance) -> bool:
        return known.session is self.present_session(known.peer)

    def verified(self, peer: PeerId, grants: Iterable[Grant]) -> dict[bytes, Grant]:
        """Of what a peer shows, what makes it a member of meshes of ours now."""
        good = {}
        for grant in grants:
            if self.ledger.grant(grant.mesh) is None:
                continue
            try:
                self.ledger.verify(grant, peer)
            except GrantError as error:
                log.warning("grant of %s does not hold: %s", peer.short, error)
                continue
            good[grant.mesh] = grant
        return good

    def held_against(self, peer: PeerId, grants: Iterable[Grant]) -> list[Revocation]:
        """What a peer may hear although we share no mesh: what voids grants of its own that would
        hold else, and that we are out of a mesh that it is in."""
        said: list[Revocation] = []
        for grant in grants:
            is_ours = self.ledger.grant(grant.mesh) is not None
            of_us = self._said_of_us(grant.mesh)
            if not is_ours and not of_us:
                continue  # a stranger's: not worth the work of a signature
            try:
                self.ledger.verify(grant, peer)
            except GrantRevoked as revoked:
                said += [revoked.revocation] if is_ours else []
            except GrantError:
                continue
            else:
                said += of_us
        return said

    def _said_of_us(self, mesh: bytes) -> list[Revocation]:
        if self.ledger.grant(mesh) is not None:
            return []
        key = self.ledger.identity.peer.key
        return [one for one in self.ledger.revocations.of_mesh(mesh) if one.subject == key]

    def acquaint(
        self, session: Session | None, word: Member, grants: Mapping[bytes, Grant]
    ) -> Acquaintance:
        """From now on the peer may open here what these grants, verified, give.

        What it has shown before on this session in other meshes stays: streams were opened by it,
        and have to end with it.
        """
        known = self._acquaintances.get(word.peer)
        if known is not None and known.session is session:
            shown = {**known.grants, **grants}
            is_news = known.introduced and known.grants != shown
            known.grants = shown
            if is_news:  # another role, or a grant that ours may follow
                self.notify()
        else:
            known = Acquaintance(word.peer, session, dict(grants))
            self._acquaintances[word.peer] = known
        now = self.ledger.now()
        for peer in filter(self.is_introduced, self._acquaintances):
            self.ledger.members.roster.saw(peer, now)
        self.ledger.remember(word, grants.values())
        return known

    def now_introduced(self, known: Acquaintance) -> None:
        """The peer has checked what we showed."""
        if self._acquaintances.get(known.peer) is not known or known.introduced:
            return
        known.introduced = True
        self.notify()
        self.wake()
        self.on_introduced(known.peer)

    def forget_session(self, session: Session) -> bool:
        """The session ended: the peer introduces itself again on the next. Says whether it was
        introduced on this one."""
        known = self._acquaintances.get(session.peer)
        if known is None or known.session is not session:
            return False
        del self._acquaintances[session.peer]
        if known.introduced:
            self.notify()
        return known.introduced

    # -- what is taken back -------------------------------------------------------------------

    def take(self, revocations: Iterable[Revocation]) -> None:
        """Takes what was taken back, applies it at once, and lets `removal` pass it on.

        Raises `MeshError` when it could not be written, applied all the same.
        """
        unknown = [one for one in revocations if not self.ledger.revocations.knows(one)]
        if not unknown:
            return
        before = {mesh: self.mesh_name(mesh) for mesh in self.ledger.meshes()}
        members = [grant for mesh in before for grant in self.ledger.members.of_mesh(mesh)]
        known = {(grant.mesh, grant.peer) for grant in members}
        names = {peer: self.member_name(peer) for _, peer in known}
        try:
            self.ledger.take(unknown)
        finally:
            self._tell_user(before, known, names)
            self.wake()

    def _tell_user(
        self,
        before: Mapping[bytes, str],
        known: set[tuple[bytes, PeerId]],
        names: Mapping[PeerId, str],
    ) -> None:
        kept = self.ledger.meshes()
        for mesh, name in before.items():
            if mesh not in kept:
                text = (
                    f"this node is no longer a member of {name}: it, or whoever invited it, was "
                    "removed or has left; to come back, ask for a new invite (`mesh invite`)"
                )
                self.emit(Event(Kind.WARNING, text, {"mesh": str(PeerId(mesh)), "removed": True}))
        for mesh, peer in sorted(known):
            if mesh in kept and self.ledger.members.shown(mesh, peer) is None:
                text = f"{names[peer]} ({peer.short}) is no longer a member of {before[mesh]}"
                data = {"peer": str(peer), "name": names[peer], "mesh": str(PeerId(mesh))}
                self.emit(Event(Kind.PEER, text, {**data, "up": False, "removed": True}))

    def wake(self) -> None:
        """Has `removal` look again at once."""
        self.news.set()
        self.news = trio.Event()

    def notify(self) -> None:
        """Somebody came, went, or is heard of."""
        self.changed.set()
        self.changed = trio.Event()

    async def follow(self, wake: Callable[[], object]) -> None:
        """Call it now, and whenever somebody came, went, or is heard of; until cancelled."""
        while True:
            changed = self.changed
            wake()
            await changed.wait()


class Hearing:
    """I give each peer a share of our time for what it tells: signatures to be looked at, files to
    be written. What its links cost is counted elsewhere (`tunnels.allowance`)."""

    def __init__(self) -> None:
        self._shares = Buckets(HEARING)

    @contextlib.asynccontextmanager
    async def of(self, peer: PeerId) -> AsyncIterator[None]:
        """Around work that does not wait, which begins once what the peer has cost is paid: also
        what it cost on a stream that it gave up. By the clock: nobody is served while a file is
        flushed, though that takes no processor."""
        while wait_s := self._shares.wait_s(peer, trio.current_time()):  # noqa: ASYNC110 - no event
            await trio.sleep(wait_s)
        began_s = perf_counter()
        try:
            yield
        finally:
            self._shares.spend(peer, trio.current_time(), perf_counter() - began_s)


@contextlib.contextmanager
def patience(stream: Stream) -> Iterator[None]:
    """Bounds a conversation that anyone may open: in time, and in what its failure costs us."""
    with trio.move_on_after(HELLO_TIMEOUT_S) as deadline:
        try:
            yield
        except NetworkError as error:
            log.info("%s of %s failed: %s", stream.service, stream.peer.short, error)
            stream.reset(str(error))
        except MeshError as error:  # our own trouble, a full disk: not the peer's to read
            log.error("%s of %s failed: %s", stream.service, stream.peer.short, error)
            stream.reset("the other node has a problem of its own: its log says which")
    if deadline.cancelled_caught:
        stream.reset(f"nothing was said for {HELLO_TIMEOUT_S:.0f} s")
