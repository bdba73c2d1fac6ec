"""WebRTC links: two descriptions swapped, then ICE, DTLS and SCTP on the asyncio island.

The two sides need a way to swap one message each before anything else: an existing session with the
peer (`swaps`), or a code that one user gives the other (`prepare` with a key that both hold). What
they say is believed as far as the address policy goes; who they are is proven inside the link, as
over every other kind.
"""

from __future__ import annotations

import importlib
import ipaddress
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from tunnels._asyncio_island import Island
from tunnels.allowance import Budget, Rate
from tunnels.binding import Address
from tunnels.dial import is_private
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
    PlaceKind,
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
AT_OUR_TURN_SERVER = Candidate("webrtc", "0.0.0.0", 9, "waiting")  # noqa: S104 - no address
"""Not a place: we wait for it ourselves (`wait_at_turn`)."""
PLACELESS = (OVER_SESSION, AT_OUR_TURN_SERVER)
COME_S = 8.0  # from a code to a link
REFRESH_S = 20.0  # NATs forget UDP after 30 s, and a TURN server whom to let in after 300
MAX_LET_IN = 8

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


class Waiting:
    """Our side of a link, at our TURN server, until somebody comes there who holds the key. It
    costs the server one allocation, until `close`."""

    def __init__(
        self, meeting: Meeting, island: Island, may_contact: Callable[[str], bool]
    ) -> None:
        found = meeting.ours.places[0]
        self.place: Address = (found.host, found.port)
        self.meeting = meeting
        self._island = island
        self._may_contact = may_contact
        self._called = trio.Event()
        meeting.link.stack.ice.on_early_check = lambda: island.tell(self._called.set)

    async def let_in(self, addresses: Iterable[Address]) -> None:
        """Keep the server open for what comes from these hosts, until cancelled. Private ones are
        others at the server than here, unless it is private itself."""
        by_host = {host: (host, port) for host, port in addresses if self._may_come_from(host)}
        # Who has no UDP comes through a server too, and maybe through this one.
        known = [self.place, *list(by_host.values())[:MAX_LET_IN]]
        while True:
            await self._island.run(self.meeting.link.stack.ice.let_in, known)
            await trio.sleep(REFRESH_S)

    def _may_come_from(self, host: str) -> bool:
        theirs, ours = ipaddress.ip_address(host), ipaddress.ip_address(self.place[0])
        strays = is_private(theirs) and not is_private(ours)
        return theirs.version == ours.version and not strays and self._may_contact(host)

    async def called(self) -> None:
        """Somebody with the key is there: dial AT_OUR_TURN_SERVER."""
        await self._called.wait()


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
        self._coming: set[bytes] = set()
        self._waiting: dict[PeerId, Waiting] = {}

    @property
    def port(self) -> int | None:
        return None

    async def run(self) -> None:
        """Nothing comes unasked."""

    async def dial(self, candidate: Candidate, expect: PeerId) -> WebRtcLink:
        """Raises LinkClosed, HandshakeFailed, BadFrame."""
        if candidate == AT_OUR_TURN_SERVER:
            waiting = self._waiting.pop(expect, None)
            if waiting is None:
                raise LinkClosed("not tried: nobody is waited for at a TURN server")
            return await waiting.meeting.connect(waiting.meeting.meant_by(()))
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

    @property
    def has_turn(self) -> bool:
        return self._servers.turn is not None

    @asynccontextmanager
    async def wait_at_turn(self, peer: PeerId, key: bytes) -> AsyncIterator[Waiting]:
        """Be at our TURN server while the block lasts, for a peer that is told our place there and
        holds `key` too. What is not dialled until then is given up. Raises LinkClosed."""
        if peer in self._waiting:
            raise LinkClosed("this node waits for that one at its TURN server already")
        servers = replace(self._servers, stun=(), relay_only=True)
        meeting = await self.prepare(peer, Role.DIALLER, key, servers)
        refusal = self._policy()
        waiting = Waiting(meeting, self._island, lambda host: refusal(host) is None)
        self._waiting[peer] = waiting
        try:
            yield waiting
        finally:
            if self._waiting.pop(peer, None) is not None:
                meeting.cancel()

    async def come_untrusted(self, places: Sequence[Address], key: bytes) -> WebRtcLink:
        """To somebody who waits at its TURN server and holds `key` too. The link is accepted as
        any stranger's. Who waits for it here no longer does not end it: which of several ways is
        taken, the other side says. Raises LinkClosed, HandshakeFailed.
        """
        refusal = self._policy()
        refused = [why for host, _ in places if (why := refusal(host)) is not None]
        if refused and len(refused) == len(places):
            raise LinkClosed(refused[0])
        if len(self._meeting) + len(self._coming) >= MAX_MEETING or key in self._coming:
            raise LinkClosed("this node is busy making links; try again in ten seconds")
        self._coming.add(key)
        give, take = trio.open_memory_channel[WebRtcLink | TunnelError](1)
        self._nursery.start_soon(self._come, places, key, give.send_nowait)
        found = await take.receive()
        if isinstance(found, TunnelError):
            raise found
        return found

    async def _come(
        self,
        places: Sequence[Address],
        key: bytes,
        tell: Callable[[WebRtcLink | TunnelError], None],
    ) -> None:
        found: WebRtcLink | TunnelError = LinkClosed(
            f"nobody was met at the other machine's TURN server in {COME_S:.0f} s"
        )
        try:
            with trio.move_on_after(COME_S):
                # Nobody is told where we look like being, so nobody is asked.
                servers = replace(self._servers, stun=())
                meeting = await self.prepare(places[0][0], Role.LISTENER, key, servers)
                there = [Place(PlaceKind.RELAYED, *one, priority=1) for one in places]
                found = await meeting.connect(meeting.meant_by(there))
        except Exception as error:
            found = error if isinstance(error, TunnelError) else LinkClosed(str(error))
        finally:
            self._coming.discard(key)
        tell(found)
        if isinstance(found, WebRtcLink) and found.closure is None:
            await self._accept(found)

    async def prepare(
        self,
        peer: Hashable,
        role: Role,
        key: bytes | None = None,
        servers: IceServers | None = None,
    ) -> Meeting:
        """Gather our addresses for a link with `peer`, whom it is charged to. key: 32 secret bytes
        that both sides hold, where nothing but addresses can be swapped
        (webrtc_description.agreed). servers: fewer than we have."""
        await trio.to_thread.run_sync(importlib.import_module, "tunnels.webrtc_stack")
        from tunnels.webrtc_ice import IceConnection
        from tunnels.webrtc_stack import Stack

        credentials = fresh(secrets.token_bytes) if key is None else agreed(key, role)
        hosts, refusal = self._own_hosts(), self._policy()

        async def begin() -> tuple[Stack, Description]:
            ice = IceConnection(
                *(role, credentials, hosts, servers or self._servers),
                lambda host: refusal(host) is None,
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
