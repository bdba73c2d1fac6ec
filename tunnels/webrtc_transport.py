"""WebRTC links: two descriptions swapped, then ICE, DTLS and SCTP on the asyncio island.

The two sides need a way to swap one message each before anything else: an existing session with the
peer (`swaps`), or a code that one user gives the other (`prepare` with a key that both hold). What
they say is believed as far as the address policy goes; who they are is proven inside the link, as
over every other kind.
"""

from __future__ import annotations

import importlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence

import trio

from tunnels._asyncio_island import Island
from tunnels.allowance import Budget, Rate
from tunnels.errors import BadFrame, LinkClosed, TunnelError
from tunnels.gate import ServiceLimits
from tunnels.handshake import Role
from tunnels.link import Accept, CloseCode
from tunnels.peer import Candidate, PeerId
from tunnels.session import Session
from tunnels.stream import Stream
from tunnels.turn import IceServers
from tunnels.webrtc import WebRtcLink
from tunnels.webrtc_description import (
    MAX_BYTES,
    Description,
    Place,
    agreed,
    encode,
    fresh,
    parse_description_untrusted,
)

MEET_S = 10.0  # for both sides to find each other, from the moment both know each other's places
MAX_MEETING = 16  # links that peers asked for and that do not stand yet

SERVICE = "webrtc"
LIMITS = ServiceLimits(
    peer_streams=1, streams=MAX_MEETING, peer_rate=Rate(0.1, burst=4), rate=Rate(4, burst=32)
)
"""Each swap makes both sides send checks to addresses that the other names."""
SWAP_S = 10.0
OVER_SESSION = Candidate("webrtc", "0.0.0.0", 9, "session")  # noqa: S104 - no address: RFC 8839
"""Not a place: the peer is asked, over the session with it, where it can be met."""

Swap = Callable[[bytes], Awaitable[bytes]]


async def swap_over(session: Session, offer: bytes) -> bytes:
    """Raises TunnelError: the peer does not want to, or said nothing that makes sense."""
    with trio.move_on_after(SWAP_S):
        stream = await session.open(SERVICE)
        try:
            await stream.send_all(offer)
            await stream.send_eof()
            return await _receive_untrusted(stream)
        finally:
            with trio.CancelScope(shield=True):
                await stream.aclose()
    raise TunnelError(f"the peer did not describe itself in {SWAP_S:.0f} s")


async def _receive_untrusted(stream: Stream) -> bytes:
    found = b""
    while piece := await stream.receive_some():
        found += piece
        if len(found) > MAX_BYTES:
            raise BadFrame("the description of a link is too long")
    return found


log = logging.getLogger(__name__)


class Meeting:
    """One link to be: our side is known, the peer's is not."""

    def __init__(
        self, link: WebRtcLink, island: Island, ours: Description, key: bytes | None
    ) -> None:
        self.link = link
        self.ours = ours
        self._key = key
        self._island = island

    async def connect(self, theirs: Description) -> WebRtcLink:
        """Raises LinkClosed, HandshakeFailed; the link is then closed."""
        link = self.link
        stack = link.stack
        try:
            found = await self._island.run(stack.connect, theirs)
        except BaseException:
            link.close(CloseCode.REFUSED, "it could not be begun")
            raise
        if link.closure is not None:
            raise LinkClosed(link.closure.reason)
        both = (stack.fingerprint, found)
        link.binding = b"".join(both if link.role is Role.DIALLER else reversed(both))
        return link

    def meant_by(self, places: Sequence[Place]) -> Description:
        """The peer's description where both hold our key: all that had to be told is its places."""
        assert self._key is not None
        return Description(agreed(self._key, self.link.role.other), None, tuple(places))

    def cancel(self) -> None:
        self.link.close(CloseCode.REFUSED, "given up")


class WebRtcTransport:
    """I make WebRTC links.

    own_hosts(): addresses of ours to be met at. policy(): as things stand now, a function that says
    why an address of a peer's may not be contacted, or None. swap_with(peer): how to swap
    descriptions with it, or None.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        accept: Accept,
        budget: Budget,
        own_hosts: Callable[[], list[str]],
        policy: Callable[[], Callable[[str], str | None]],
        swap_with: Callable[[PeerId], Swap | None],
        servers: IceServers = IceServers(),  # noqa: B008 - frozen
    ) -> None:
        self._nursery = nursery
        self._accept = accept
        self._budget = budget
        self._own_hosts = own_hosts
        self._policy = policy
        self._swap_with = swap_with
        self._servers = servers
        self._island = Island(nursery)
        self._meeting: dict[PeerId, Meeting] = {}

    @property
    def port(self) -> int | None:
        return None

    async def run(self) -> None:
        """Nothing comes unasked."""

    async def dial(self, candidate: Candidate, expect: PeerId) -> WebRtcLink:  # noqa: ARG002
        """Raises LinkClosed, HandshakeFailed, BadFrame."""
        swap = self._swap_with(expect)
        if swap is None:
            raise LinkClosed("not tried: a WebRTC link begins over another link to the same node")
        meeting = await self.prepare(expect, Role.DIALLER)
        try:
            theirs = parse_description_untrusted(await swap(encode(meeting.ours)))
        except BaseException:
            meeting.cancel()
            raise
        return await meeting.connect(theirs)

    async def answer_untrusted(self, peer: PeerId, offer: bytes) -> bytes:
        """Our description for a peer that dials us; the link is accepted when it stands.

        Raises BadFrame, LinkClosed.
        """
        theirs = parse_description_untrusted(offer)
        if len(self._meeting) >= MAX_MEETING or peer in self._meeting:
            raise LinkClosed("this node is busy making links; try again later")
        meeting = await self.prepare(peer, Role.LISTENER)
        self._meeting[peer] = meeting
        self._nursery.start_soon(self._hear, peer, meeting, theirs)
        return encode(meeting.ours)

    async def serve(self, stream: Stream) -> None:
        """The service of a peer that dials us. Raises BadFrame, LinkClosed, StreamError."""
        with trio.move_on_after(SWAP_S):
            offer = await _receive_untrusted(stream)
            await stream.send_all(await self.answer_untrusted(stream.peer, offer))
            await stream.send_eof()

    async def prepare(self, peer: PeerId, role: Role, key: bytes | None = None) -> Meeting:
        """Gather our addresses for a link with `peer`. key: 32 secret bytes that both sides hold,
        where nothing but addresses can be swapped (webrtc_description.agreed)."""
        await trio.to_thread.run_sync(importlib.import_module, "tunnels.webrtc_stack")
        from tunnels.webrtc_ice import IceConnection
        from tunnels.webrtc_stack import Stack

        credentials = fresh(secrets.token_bytes) if key is None else agreed(key, role)
        hosts, refusal = self._own_hosts(), self._policy()

        async def begin() -> tuple[Stack, Description]:
            ice = IceConnection(
                role, credentials, hosts, self._servers, lambda host: refusal(host) is None
            )
            stack = Stack(self._island, role, ice)
            places = await stack.gather()
            fingerprint = stack.fingerprint if key is None else None
            return stack, Description(credentials, fingerprint, places)

        stack, ours = await self._island.run(begin)
        link = WebRtcLink(stack, role, self._budget.share(peer))
        if not ours.places:
            link.close(CloseCode.REFUSED, "nowhere to be met")
            raise LinkClosed(
                "this node has no address to be met at: no network is up, or the TURN server did "
                "not answer, or refused its user and password"
            )
        return Meeting(link, self._island, ours, key)

    async def _hear(self, peer: PeerId, meeting: Meeting, theirs: Description) -> None:
        try:
            with trio.move_on_after(MEET_S):
                link = await meeting.connect(theirs)
        except Exception as error:
            log.debug("no link with %s: %s", peer.short, error)
            return
        finally:
            del self._meeting[peer]
        if meeting.link.closure is None:
            await self._accept(link)
