"""What a node does for peers that cannot reach each other: it carries bytes that it cannot read.

This docstring is the spec. Three services, each a stream of a session with the relay R:

    reserve         B to R: peers may be joined to me, as long as this stream stands
    relay/<peer B>  A to R: join me to B
    relayed/<peer A>  R to B: A wants to be joined to you, or somebody who calls itself so

R's first byte on each says what R is (Carries), and then nothing of R's follows: on `relay/` and
`relayed/` the other end's bytes do, both ways, and each direction's end; a reset of one stream is
a reset of the other, with its reason. Inside, A and B speak the tcp link's protocol, a relayed
stream for each of its connections (relay_transport.py): TLS with the key that A seeks. So R, which
could say anything in `relayed/`, is believed in nothing; it can carry, refuse, delay and drop.

Only members reserve: `authorize` is asked for `reserve`. To a peer that reserved anyone is joined,
a stranger within small caps (relay_caps.py), since whoever holds an invite is one until it has come
through; the peer's own door decides about it. What is over another relay is not relayed again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum

import trio

from tunnels.allowance import Rate
from tunnels.errors import BadFrame, StreamError, TunnelError
from tunnels.gate import ServiceLimits
from tunnels.peer import PeerId, parse_peer_id_untrusted
from tunnels.relay_caps import Accounts, CapReached, Carriage, Standing
from tunnels.session import Session
from tunnels.stream import Stream

RESERVE = "reserve"
RELAY = "relay/"
RELAYED = "relayed/"
KIND = "relay"  # of link

MAX_RESERVATIONS = 1024
CHUNK_BYTES = 64 << 10

RESERVING = ServiceLimits(
    peer_streams=2, streams=MAX_RESERVATIONS, peer_rate=Rate(0.5, 8), rate=Rate(50, 256)
)
# The accounts decide about these; the gate is a backstop.
JOINING = ServiceLimits(peer_streams=64, streams=512, peer_rate=Rate(20, 256), rate=Rate(200, 1024))

NOT_HERE = "it is not connected here, or did not ask to be reached"
log = logging.getLogger(__name__)


class Carries(Enum):
    """What a node carries for members, as its first byte tells."""

    TRAFFIC = 1
    INTRODUCTIONS = 2


def parse_carries_untrusted(data: bytes) -> Carries:
    """Raises BadFrame."""
    try:
        return Carries(data[0])
    except (IndexError, ValueError):
        raise BadFrame("a relay says what no relay says") from None


class Relay:
    """I join peers to those that reserved.

    is_member: whether a peer is one, on its present session. session: the present one with a peer.
    """

    def __init__(
        self,
        *,
        is_member: Callable[[PeerId], bool],
        session: Callable[[PeerId], Session | None],
        carries: Carries,
    ) -> None:
        self.carries = carries
        self._is_member = is_member
        self._session = session
        self._reserved: dict[PeerId, Stream] = {}
        self._accounts = Accounts(trio.current_time())

    def reservations(self) -> frozenset[PeerId]:
        """Who can be reached through this node."""
        return frozenset(self._reserved)

    @property
    def streams(self) -> int:
        """Carried now."""
        return self._accounts.streams

    async def reserve(self, stream: Stream) -> None:
        """The service `reserve`: while its stream stands, the peer can be reached through us."""
        peer = stream.peer
        if is_relayed(self._session(peer)):
            stream.reset("this node is reached through another relay")
            return
        if len(self._reserved) >= MAX_RESERVATIONS and peer not in self._reserved:
            stream.reset("too many peers are reached through this node already")
            return
        self._reserved[peer] = stream  # a newer one takes the place of the one before
        try:
            await stream.send_all(self._first_byte)
            while await stream.receive_some():
                pass
        finally:
            if self._reserved.get(peer) is stream:
                del self._reserved[peer]

    async def join(self, near: Stream) -> None:
        """The service `relay/<peer>`: joins the peer that opened `near` to the one it names."""
        try:
            carriage = self._admit(near)
        except CapReached as refusal:
            near.reset(str(refusal))
            return
        try:
            far = await self._reach(near)
            async with far:
                await self._carry(near, far, carriage)
        except StreamError:
            pass  # the other one was told
        except TunnelError as error:
            near.reset(f"the peer cannot be reached through this relay: {error}")
        finally:
            carriage.leave()

    def _admit(self, near: Stream) -> Carriage:
        """Raises CapReached."""
        return self._accounts.open(near.peer, self._standing(near.peer), trio.current_time())

    def _standing(self, peer: PeerId) -> Standing:
        if not self._is_member(peer):
            return Standing.STRANGER
        return Standing.CARRIED if self.carries is Carries.TRAFFIC else Standing.INTRODUCED

    async def _reach(self, near: Stream) -> Stream:
        """Raises TunnelError."""
        peer = parse_peer_id_untrusted(near.service.removeprefix(RELAY))
        session = self._session(peer)
        if session is None or peer not in self._reserved or peer == near.peer:
            raise TunnelError(NOT_HERE)
        if is_relayed(session) or is_relayed(self._session(near.peer)):
            raise TunnelError("the way there leads through another relay")
        return await session.open(f"{RELAYED}{near.peer}")

    async def _carry(self, near: Stream, far: Stream, carriage: Carriage) -> None:
        """Until both directions have ended, or either stream has failed."""

        async def copy(source: Stream, sink: Stream) -> None:
            try:
                await self._copy(source, sink, carriage)
            except (CapReached, StreamError, trio.ClosedResourceError) as error:
                for stream in (near, far):
                    stream.reset(str(error))

        try:
            await far.send_all(self._first_byte)
            await near.send_all(self._first_byte)
        except StreamError as error:
            near.reset(str(error))
            far.reset(str(error))
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(copy, near, far)
            nursery.start_soon(copy, far, near)

    async def _copy(self, source: Stream, sink: Stream, carriage: Carriage) -> None:
        while data := await source.receive_some(CHUNK_BYTES):
            now, standing = trio.current_time(), self._standing(carriage.peer)
            wait_s = self._accounts.spend(carriage, standing, len(data), now)
            await trio.sleep(wait_s)
            await sink.send_all(data)
        await sink.send_eof()

    @property
    def _first_byte(self) -> bytes:
        return bytes((self.carries.value,))


def is_relayed(session: Session | None) -> bool:
    link = None if session is None else session.best_link
    return link is not None and link.kind == KIND
