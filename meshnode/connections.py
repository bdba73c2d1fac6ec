"""Sessions to the members of our meshes: dialled, introduced, dialled again when lost."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import trio

from discovery.grants import GRANTABLE, Role
from discovery.roster import Member
from discovery.token import Token
from meshnode.circle import LET_GO, Circle
from meshnode.crash_points import reached
from meshnode.errors import AccessError, MeshError, NetworkError
from meshnode.events import Emit, Event, Kind
from meshnode.hearsay import Hearsay
from meshnode.introducing import Introductions
from meshnode.joining import Joining
from meshnode.membership import Membership
from meshnode.removal import Removal
from meshnode.renewal import Renewal
from meshnode.replies import Replies
from meshnode.reserving import Reserving
from tunnels import (
    Candidate,
    Change,
    DialFailed,
    Endpoint,
    PeerId,
    Session,
    SessionBack,
    SessionDown,
    SessionSilent,
    SessionUp,
    Stream,
    TunnelError,
)
from tunnels.allowance import Buckets, Rate
from tunnels.gate import ASK, GREET, TALK
from tunnels.relay_transport import relay_of

log = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 10.0
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 30.0
LOOK_AGAIN_S = 0.2  # whether a dial of somebody else's has failed
SIGHTINGS = Rate(per_s=0.2, burst=3)  # of one member, that have it dialled at once
STRANGER_TIMEOUT_S = 30.0  # from a session's start to its introduction
DIALS = Rate(per_s=4, burst=32)
"""Addresses tried of members known by others' words alone, for each inviter: it can make up members
of 16 addresses each, and a dial that nobody answers is work for a handshake's half."""
RECONSIDER_S = 10.0  # with whom of many to keep sessions
MAX_STRANGERS = 64  # sessions not introduced yet; the rest of the endpoint's are for members


@dataclass
class _Dial:
    """A member is being dialled."""

    places: tuple[Candidate, ...]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Connections:
    """I bring this node to its peers and keep it there."""

    def __init__(self, endpoint: Endpoint, membership: Membership, emit: Emit) -> None:
        self.settled = trio.Event()  # every known peer was tried once
        self.joining = Joining(membership.ledger)
        self.introductions = Introductions(membership)
        self.removal = Removal(membership, self.introductions)
        self.renewal = Renewal(membership, self._reintroduce)
        self.circle = Circle(membership, self.renewal.renewers)
        self.hearsay = Hearsay(membership, endpoint.candidates)
        self.replies = Replies(endpoint, membership.ledger, emit)
        self.reserving = Reserving(endpoint, membership)
        self._endpoint = endpoint
        self._membership = membership
        self._emit = emit
        self.look_around: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        """Returns once those were sighted who are on the local network; `run` waits for it."""
        self.on_connected: Callable[[Session], None] = lambda _session: None
        """Told of each session that the user was told of, at once."""
        self._wanted: frozenset[PeerId] = frozenset()
        self._kept: set[PeerId] = set()
        self._sighted: dict[PeerId, tuple[Candidate, ...]] = {}
        self._sightings = Buckets(SIGHTINGS)
        self._under_way: dict[PeerId, _Dial] = {}
        self._pauses: dict[PeerId, trio.CancelScope] = {}
        self._met: set[PeerId] = set()
        self._dials = Buckets(DIALS)
        membership.present_session = endpoint.session
        membership.on_introduced = self._report_introduced
        membership.emit = emit

    def offer_services(self) -> None:
        """Answers what keeps meshes together, from now on."""

        async def hello(stream: Stream) -> None:
            await self.introductions.serve(stream, self._endpoint.candidates())

        self._endpoint.serve("join", self.joining.serve, TALK)
        self._endpoint.serve("hello", hello, GREET)
        self._endpoint.serve("revocations", self.removal.serve, ASK)
        self._endpoint.serve("renew", self.renewal.serve, TALK)
        self._endpoint.serve("roster", self.hearsay.serve, ASK)

    def introduced(self) -> list[Session]:
        """Live sessions whose peer has shown a grant of a mesh of ours."""
        return [
            session
            for session in self._endpoint.sessions()
            if self._membership.is_introduced(session.peer)
        ]

    async def run(self, joins: Sequence[Token]) -> None:
        """Joins with `joins`, then keeps sessions up for ever. Raises what `join` does when not one
        of them leads anywhere."""
        async with trio.open_nursery() as nursery:
            # Subscribed before the first dial, so that no session comes up unseen.
            nursery.start_soon(self._watch_sessions, nursery, self._endpoint.subscribe())
            nursery.start_soon(self.removal.run)
            nursery.start_soon(self.renewal.run)
            nursery.start_soon(self.hearsay.run)
            nursery.start_soon(self.reserving.run)
            async with trio.open_nursery() as first_round:
                first_round.start_soon(self._join_all, joins)
                first_round.start_soon(self.look_around)
                for peer in self.circle.wanted():
                    first_round.start_soon(self._try_member, peer)
            self.settled.set()
            while True:
                changed = self._membership.changed
                self._wanted = self.circle.wanted()
                for peer in self._wanted:
                    self._tell_places(peer)
                for peer in self._wanted - self._kept:
                    self._kept.add(peer)
                    nursery.start_soon(self._keep_connected, peer)
                for session in self.circle.unused(self.introduced(), self._wanted):
                    session.end(LET_GO)
                # Where all are kept, nothing but a change changes whom.
                with trio.move_on_after(math.inf if self.circle.is_whole else RECONSIDER_S):
                    await changed.wait()

    def sighted(self, peer: PeerId, places: Sequence[Candidate]) -> None:
        """A member says on the local network that it is at `places`: whoever waits or tries to
        reach it elsewhere tries there, at once unless that happens too often."""
        if self._membership.member(peer) is None:
            return
        self._sighted[peer] = tuple(places)
        self._tell_places(peer)
        dial, pause = self._under_way.get(peer), self._pauses.get(peer)
        if dial is not None and set(places) <= set(dial.places):
            return
        if self._sightings.take(peer, trio.current_time()):
            if dial is not None:
                dial.scope.cancel()
            if pause is not None:
                pause.cancel()

    async def meet(
        self, peer: PeerId, places: Sequence[Candidate], meshes: Iterable[bytes]
    ) -> None:
        """Dials somebody who says that it is a member of `meshes`, all of them ours, and whom we
        have not met. Raises `MeshError` or `TunnelError` where it is not, or is not there."""
        try:
            with trio.fail_after(JOIN_TIMEOUT_S):
                await self._introduce(await self._endpoint.connect(peer, places), meshes)
        except trio.TooSlowError:
            raise NetworkError(f"it did not answer in {JOIN_TIMEOUT_S:.0f} s") from None

    async def _join_all(self, joins: Sequence[Token]) -> None:
        """All at once. One dead invite does not hold up the others: it is a warning."""
        failures: list[MeshError] = []

        async def join(token: Token) -> None:
            try:
                await self.join(token)
            except MeshError as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for token in joins:
                nursery.start_soon(join, token)
        if failures and len(failures) == len(joins):
            raise failures[0]
        for failure in failures:
            self._emit(Event(Kind.WARNING, f"{failure}; going on with the other invites"))

    async def join(self, token: Token) -> None:
        """Raises `AccessError` (the invite) or `NetworkError` (the way to the inviter)."""
        if token.inviter == self._endpoint.peer:
            raise AccessError(
                "this invite was made by this very node: paste it on another machine, "
                "or start the second node with --home"
            )
        role = self._membership.role_in(token.mesh)
        expired = token.expires_at <= self._membership.ledger.now()
        if expired and role is None:
            raise AccessError("the invite has expired: ask for a new one (`mesh invite`)")
        has_more = role is not None and token.role in GRANTABLE[role]
        redeems = not has_more and not expired
        if role is not None and has_more and role is not token.role and not expired:
            self._tell_kept_role(token, role)
        try:
            session = await self._reach_inviter(token)
            with trio.fail_after(JOIN_TIMEOUT_S):
                if redeems:
                    await self.joining.redeem(session, token)
                await self._introduce(session, (token.mesh,))
                reached("join.introduced")
        except TunnelError as error:
            raise NetworkError(f"joining failed: {error}") from None
        except trio.TooSlowError:
            raise NetworkError(
                f"joining failed: the inviter {token.inviter.short} was reached but did not answer "
                f"in {JOIN_TIMEOUT_S:.0f} s; try again, or restart it"
            ) from None

    async def _reach_inviter(self, token: Token) -> Session:
        """Raises `TunnelError`. Where packets vanish, a reply code may help (replies.py)."""
        try:
            with trio.fail_after(JOIN_TIMEOUT_S):
                return await self._endpoint.connect(token.inviter, token.candidates)
        except DialFailed as error:
            unheard = any(one.transport == "quic" for one in error.unheard)
            if not (unheard and self.replies.wait_s):
                raise
        heard_at = await self.replies.call_back(token)
        with trio.fail_after(JOIN_TIMEOUT_S):
            return await self._endpoint.connect(token.inviter, [heard_at])

    def _tell_kept_role(self, token: Token, role: Role) -> None:
        name = self._membership.mesh_name(token.mesh)
        text = (
            f"this node stays {role.value} in {name}, which is more than the {token.role.value} of "
            "the invite: to become less, `mesh leave` first, then join again"
        )
        self._emit(Event(Kind.WARNING, text))

    async def _introduce(self, session: Session, meshes: Iterable[bytes] = ()) -> None:
        await self.introductions.introduce(session, self._endpoint.candidates(), meshes)
        await self._show_to_relay(session)

    async def _show_to_relay(self, session: Session) -> None:
        """Whoever carries us to a member, and does not know us yet, learns that we are one too: a
        stranger gets little carried."""
        relay = relay_of(session)
        leg = None if relay is None else self._endpoint.session(relay)
        if leg is None or self._membership.is_introduced(leg.peer):
            return
        try:
            await self.introductions.introduce(
                leg, self._endpoint.candidates(), self._membership.shown_by(session.peer)
            )
        except (TunnelError, MeshError) as error:
            log.info("the relay %s does not know this node: %s", leg.peer.short, error)

    async def _reintroduce(self, mesh: bytes) -> None:
        """Shows what we are in `mesh` now to its members that are connected, to all at once: one
        that does not listen holds up no other."""
        async with trio.open_nursery() as nursery:
            for session in self.introduced():
                if mesh in self._membership.shown_by(session.peer):
                    nursery.start_soon(self.show_again, session)

    async def show_again(self, session: Session) -> None:
        """Says hello once more: what we are, or where, has changed."""
        try:
            with trio.fail_after(JOIN_TIMEOUT_S):
                await self._introduce(session)
        except (TunnelError, MeshError, trio.TooSlowError) as error:
            log.info("%s was not told what is new about us: %s", session.peer.short, error)

    def _report_introduced(self, peer: PeerId) -> None:
        if (dial := self._under_way.get(peer)) is not None:
            # The peer was quicker. Not before this moment: two that dial each other would each give
            # up the link that the other has just taken.
            dial.scope.cancel()
        session = self._endpoint.session(peer)
        if session is None:
            return  # over already
        session.welcome()
        self.circle.tried(peer, well=True)
        self._met.add(peer)
        self._try_through(peer)
        self._tell_places(peer)
        name, stats = self._membership.member_name(peer), session.stats
        text = f"connected to {name} ({peer.short}) over {stats.link_kind} at {stats.remote}"
        self._emit(Event(Kind.PEER, text, {"peer": str(peer), "name": name, "up": True}))
        self.on_connected(session)

    async def reach(self, peer: PeerId) -> None:
        """Dials a member now, or waits for who is about to. Returns when it is introduced, or could
        not be reached."""
        if peer not in self._under_way:
            await self._try_member(peer)
        while peer in self._under_way and not self._membership.is_introduced(peer):
            with trio.move_on_after(LOOK_AGAIN_S):
                await self._membership.changed.wait()

    def _try_through(self, relay: PeerId) -> None:
        """Whoever waits to be dialled again, and is reached through this relay, waits no longer."""
        for peer, pause in self._pauses.items():
            member = self._membership.member(peer)
            if member is not None and any(one.via == relay for one in member.candidates):
                pause.cancel()

    def _tell_places(self, peer: PeerId) -> None:
        """Where the endpoint is to look for it, should its links die."""
        member = self._membership.member(peer)
        if member is not None:
            self._endpoint.learn(peer, (*self._sighted.get(peer, ()), *member.candidates))

    async def _try_member(self, peer: PeerId) -> bool:
        """Whether the member could be reached, and is introduced now."""
        if self._membership.is_introduced(peer):
            return True
        member = self._membership.member(peer)
        if member is None:
            return False
        try:
            with trio.fail_after(JOIN_TIMEOUT_S):
                await self._introduce(await self._connect(member))
        except (TunnelError, MeshError, trio.TooSlowError) as error:
            log.info("%s (%s) is not reachable: %s", member.name, peer.short, error)
            self.circle.tried(peer, well=False)
            return False
        return True

    async def _connect(self, member: Member) -> Session:
        """Dials where the member was sighted, and where it was before; from the start again when it
        is sighted meanwhile, or has come to us. Raises `TunnelError`."""
        while True:
            places = (*self._sighted.get(member.peer, ()), *member.candidates)
            dial = self._under_way[member.peer] = _Dial(places)
            try:
                with dial.scope:
                    return await self._endpoint.connect(member.peer, places)
            finally:
                del self._under_way[member.peer]

    async def _keep_connected(self, peer: PeerId) -> None:
        """Ends when the member is gone from the roster, or from the circle. Tries that fail, and
        sessions that do not last, are followed by a growing pause."""
        retry_s = FIRST_RETRY_S
        while peer in self._wanted and self._membership.member(peer) is not None:
            if peer not in self._met:
                await self._wait_turn(peer)
            began_s = trio.current_time()
            if await self._try_member(peer):
                session = self._endpoint.session(peer)
                if session is not None:
                    await session.closed.wait()
                if trio.current_time() - began_s > LAST_RETRY_S:
                    retry_s = FIRST_RETRY_S
                    continue
            with trio.move_on_after(retry_s) as self._pauses[peer]:
                await trio.sleep_forever()
            del self._pauses[peer]
            retry_s = min(2 * retry_s, LAST_RETRY_S)
        self._kept.discard(peer)
        self._sighted.pop(peer, None)
        self._met.discard(peer)

    async def _wait_turn(self, peer: PeerId) -> None:
        """For a member that we have never met ourselves."""
        member, ledger = self._membership.member(peer), self._membership.ledger
        if member is not None:
            grants = (ledger.shown(mesh, peer) for mesh in ledger.proven(peer))
            inviters = sorted(grant.issuer for grant in grants if grant is not None)
            cost = len(member.candidates) + len(self._sighted.get(peer, ()))
            key = inviters[0] if inviters else None
            await trio.sleep(self._dials.spend(key, trio.current_time(), cost))

    async def _watch_sessions(
        self,
        nursery: trio.Nursery,
        changes: trio.MemoryReceiveChannel[Change],
    ) -> None:
        async for change in changes:
            if isinstance(change, SessionUp):
                self._make_room()
                nursery.start_soon(self._end_stranger, change.session)
            elif not isinstance(change, SessionDown):
                self._tell_silence(change)
            elif self._membership.forget_session(change.session):
                name = self._membership.member_name(change.peer)
                text = f"lost {name} ({change.peer.short}): {change.reason}"
                if change.reason == LET_GO:
                    text = f"let {name} ({change.peer.short}) go: {change.reason}"
                data = {"peer": str(change.peer), "name": name, "up": False}
                self._emit(Event(Kind.PEER, text, data))

    def _tell_silence(self, change: SessionSilent | SessionBack) -> None:
        peer = change.peer
        if not self._membership.is_introduced(peer):
            return
        self.circle.tried(peer, well=isinstance(change, SessionBack))
        name = self._membership.member_name(peer)
        data = {"peer": str(peer), "name": name, "up": True}
        if isinstance(change, SessionSilent):
            text = f"connection to {name} ({peer.short}) interrupted; its streams wait for it"
            data["interrupted"] = True
        else:
            text = f"{name} ({peer.short}) is back after {change.after_s:.1f} s"
            data["interrupted"] = False
            self._membership.notify()  # plans made meanwhile were made without it
        self._emit(Event(Kind.PEER, text, data))

    async def _end_stranger(self, session: Session) -> None:
        """Anyone with a key gets a session; whoever makes nothing of it loses it again."""
        with trio.move_on_after(STRANGER_TIMEOUT_S):
            await session.closed.wait()
        if self._is_stranger(session):
            session.end(f"no introduction within {STRANGER_TIMEOUT_S:.0f} s")

    def _make_room(self) -> None:
        strangers = [one for one in self._endpoint.sessions() if self._is_stranger(one)]
        for session in strangers[:-MAX_STRANGERS]:  # the oldest come first
            session.end("too many strangers are connected here")

    def _is_stranger(self, session: Session) -> bool:
        present = self._endpoint.session(session.peer) is session
        return present and not self._membership.is_introduced(session.peer)
