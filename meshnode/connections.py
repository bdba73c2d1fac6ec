"""Sessions to the members of our meshes: begun, introduced, kept up, and told of.

The rooms around: `bootstrap` (into a mesh by an invite), `dialling` (members reached, again when
lost), `circle` (whom to keep in touch with), `strangers` (who has shown us nothing yet).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from discovery.token import Token
from meshnode.bootstrap import Bootstrap
from meshnode.circle import LET_GO, Circle
from meshnode.dialling import JOIN_TIMEOUT_S, Dialling
from meshnode.errors import MeshError, NetworkError
from meshnode.events import Emit, Event, Kind
from meshnode.hearsay import Hearsay
from meshnode.introducing import Introductions
from meshnode.joining import Joining
from meshnode.membership import Membership
from meshnode.removal import Removal
from meshnode.renewal import Renewal
from meshnode.replies import Replies
from meshnode.reserving import Reserving
from meshnode.strangers import Strangers
from tunnels import (
    Change,
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
from tunnels.gate import ASK, GREET, TALK
from tunnels.relay import KIND
from tunnels.relay_transport import relay_of

log = logging.getLogger(__name__)

RECONSIDER_S = 10.0  # with whom of many to keep sessions


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
        self.dialling = Dialling(endpoint, membership, self.circle, self._introduce)
        self._bootstrap = Bootstrap(
            endpoint, membership, self.joining, self.replies, self._introduce, emit
        )
        self._strangers = Strangers(endpoint, membership)
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
                first_round.start_soon(self._bootstrap.join_all, joins, nursery)
                first_round.start_soon(self.look_around)
                for peer in self.circle.wanted():
                    first_round.start_soon(self.dialling.try_member, peer)
            self.settled.set()
            while True:
                changed = self._membership.changed
                wanted = self.circle.wanted()
                self.dialling.keep(wanted, nursery)
                for session in self.circle.unused(self.introduced(), wanted):
                    session.end(LET_GO)
                # Where all are kept, nothing but a change changes whom.
                with trio.move_on_after(math.inf if self.circle.is_whole else RECONSIDER_S):
                    await changed.wait()

    async def reach_for(self, peer: PeerId, asker: PeerId) -> Session:
        """The session with a member of a mesh that the asker has shown a grant of, too; dialled by
        what we know of it, where there is none. Waits for a straight link: a way through a relay
        is no shorter than one through the asker. Raises `NetworkError`."""
        if not self._membership.share_mesh(peer, asker):
            raise NetworkError("it is no member of a mesh that both are in")
        await self.dialling.reach(peer)
        session = self._endpoint.session(peer)
        while session is not None and not session.suspected:
            if not self._membership.is_introduced(peer):
                break
            if session.best_link is not None and session.best_link.kind != KIND:
                return session
            await session.wait_links_changed()
        raise NetworkError("it is not connected")

    async def join(self, token: Token) -> None:
        """By one invite; raises what `Bootstrap.join` does."""
        await self._bootstrap.join(token)

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
        self.dialling.give_up(peer)
        session = self._endpoint.session(peer)
        if session is None:
            return  # over already
        session.welcome()
        self.dialling.met(peer)
        name, stats = self._membership.member_name(peer), session.stats
        text = f"connected to {name} ({peer.short}) over {stats.link_kind} at {stats.remote}"
        self._emit(Event(Kind.PEER, text, {"peer": str(peer), "name": name, "up": True}))
        self.on_connected(session)

    async def _watch_sessions(
        self,
        nursery: trio.Nursery,
        changes: trio.MemoryReceiveChannel[Change],
    ) -> None:
        async for change in changes:
            if isinstance(change, SessionUp):
                self._strangers.make_room()
                nursery.start_soon(self._strangers.end_unless_introduced, change.session)
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
