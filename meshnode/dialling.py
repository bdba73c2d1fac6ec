"""Members are dialled, wherever they are thought to be, and dialled again when they are lost."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import trio

from discovery.roster import Member
from meshnode.circle import Circle
from meshnode.errors import MeshError, NetworkError
from meshnode.membership import Membership
from tunnels import Candidate, Endpoint, PeerId, Session, TunnelError
from tunnels.allowance import Buckets, Rate

log = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 10.0
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 30.0
LOOK_AGAIN_S = 0.2  # whether a dial of somebody else's has failed
SIGHTINGS = Rate(per_s=0.2, burst=3)  # of one member, that have it dialled at once
DIALS = Rate(per_s=4, burst=32)
"""Addresses tried of members known by others' words alone, for each inviter: it can make up members
of 16 addresses each, and a dial that nobody answers is work for a handshake's half."""

Introduce = Callable[[Session, Iterable[bytes]], Awaitable[None]]
"""Shows what we are on a session, in these meshes and those that the peer is known to be in. Raises
`MeshError` or `TunnelError`."""


@dataclass
class _Dial:
    """A member is being dialled."""

    places: tuple[Candidate, ...]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class Dialling:
    """I get sessions to members, and keep up those that are wanted."""

    def __init__(
        self, endpoint: Endpoint, membership: Membership, circle: Circle, introduce: Introduce
    ) -> None:
        self._endpoint = endpoint
        self._membership = membership
        self._circle = circle
        self._introduce = introduce
        self._wanted: frozenset[PeerId] = frozenset()
        self._kept: set[PeerId] = set()
        self._sighted: dict[PeerId, tuple[Candidate, ...]] = {}
        self._sightings = Buckets(SIGHTINGS)
        self._under_way: dict[PeerId, _Dial] = {}
        self._pauses: dict[PeerId, trio.CancelScope] = {}
        self._met: set[PeerId] = set()
        self._dials = Buckets(DIALS)

    def keep(self, wanted: frozenset[PeerId], nursery: trio.Nursery) -> None:
        """From now on these are dialled again whenever they are lost, and no others."""
        self._wanted = wanted
        for peer in wanted:
            self._tell_places(peer)
        for peer in wanted - self._kept:
            self._kept.add(peer)
            nursery.start_soon(self._keep_connected, peer)

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

    async def reach(self, peer: PeerId) -> None:
        """Dials a member now, or waits for who is about to. Returns when it is introduced, or could
        not be reached."""
        if peer not in self._under_way:
            await self.try_member(peer)
        while peer in self._under_way and not self._membership.is_introduced(peer):
            with trio.move_on_after(LOOK_AGAIN_S):
                await self._membership.changed.wait()

    async def try_member(self, peer: PeerId) -> bool:
        """Whether the member could be reached, and is introduced now."""
        if self._membership.is_introduced(peer):
            return True
        member = self._membership.member(peer)
        if member is None:
            return False
        try:
            with trio.fail_after(JOIN_TIMEOUT_S):
                await self._introduce(await self._connect(member), ())
        except (TunnelError, MeshError, trio.TooSlowError) as error:
            log.info("%s (%s) is not reachable: %s", member.name, peer.short, error)
            self._circle.tried(peer, well=False)
            return False
        return True

    def give_up(self, peer: PeerId) -> None:
        """The peer was quicker: it is introduced on a session. Not before that moment: two that
        dial each other would each give up the link that the other has just taken."""
        if (dial := self._under_way.get(peer)) is not None:
            dial.scope.cancel()

    def met(self, peer: PeerId) -> None:
        """The peer is connected, and introduced."""
        self._circle.tried(peer, well=True)
        self._met.add(peer)
        self._try_through(peer)
        self._tell_places(peer)

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
            if await self.try_member(peer):
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
            grants = (ledger.members.shown(mesh, peer) for mesh in ledger.members.proven(peer))
            inviters = sorted(grant.issuer for grant in grants if grant is not None)
            cost = len(member.candidates) + len(self._sighted.get(peer, ()))
            key = inviters[0] if inviters else None
            await trio.sleep(self._dials.spend(key, trio.current_time(), cost))
