"""QUIC connections over the node's one socket: who a datagram belongs to, dialling, accepting.

A datagram that belongs to no connection costs one table look-up, and at most one new connection
when it is a well-formed Initial and the door (door.py) says so; garbage leaves nothing.
"""

from __future__ import annotations

import math
import secrets
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable
from typing import TypeVar

import trio
from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.packet import (
    QuicHeader,
    QuicPacketType,
    QuicProtocolVersion,
    encode_quic_retry,
    pull_quic_header,
)
from aioquic.quic.retry import QuicRetryTokenHandler

from tunnels import quic_size
from tunnels import quic_tuning as tuning
from tunnels.allowance import Budget
from tunnels.binding import REFUSED, Address, unreached
from tunnels.demux import Batch, SharedSocket
from tunnels.door import Door, Verdict, network_of
from tunnels.errors import LinkClosed, Refused, WrongPeer
from tunnels.handshake import Role
from tunnels.identity import Identity, certificate_hash, certificate_peer
from tunnels.link import Accept, CloseCode
from tunnels.peer import Candidate, PeerId
from tunnels.pmtu import BASE_BYTES
from tunnels.quic import VIRTUAL_ADDRESS, QuicLink
from tunnels.quic_size import DatagramSize

ALPN = "mesh/1"
QUIC_VERSION = QuicProtocolVersion.VERSION_1
OWN_ADDRESSES_FRESH_S = 5.0
CONGESTION_CONTROL = "reno"  # "cubic" measured the same within noise
IDLE_TIMEOUT_S = 120.0  # a backstop: sessions notice silence much sooner
CID_BYTES = 8
MAX_CID_BYTES = 20
_VERSION_NEGOTIATION = bytes(4)
MAX_REMOTE_DATAGRAM_BYTES = 1500  # no node sends larger ones to another machine


Result = TypeVar("Result")


class QuicTransport:
    """I own the connections of one socket.

    knock: waits until somebody answers at an address, and says whether that is a node
    (stun_port.py); nothing else goes where no peer has answered yet. accept: called for each
    connection that a stranger opens; it returns when the stranger has proven itself or is gone.
    budget: what all links of the node share (allowance.py).
    """

    def __init__(
        self,
        identity: Identity,
        socket: SharedSocket,
        knock: Callable[[Address], Awaitable[bool]],
        nursery: trio.Nursery,
        accept: Accept,
        own_addresses: Callable[[], list[str]],
        budget: Budget,
    ) -> None:
        self._identity = identity
        self._own_addresses = own_addresses
        self._own: frozenset[str] = frozenset()
        self._own_until_s = -math.inf
        self._socket = socket
        self._knock = knock
        self._nursery = nursery
        self._accept = accept
        self._links: dict[bytes, QuicLink] = {}
        self._door = Door(trio.current_time())
        self._budget = budget
        self._tokens = QuicRetryTokenHandler()
        self._unreachable: dict[Address, str] = {}
        self._answered = socket.answered
        self._dialling: Counter[Address] = Counter()
        self._refused = trio.lowlevel.ParkingLot()
        socket.on_unreachable = self._on_unreachable

    @property
    def port(self) -> int:
        return self._socket.local[1]

    async def run(self) -> None:
        """Accept connections until cancelled."""
        self._socket.on_quic = self._receive
        try:
            await trio.sleep_forever()
        finally:
            self._socket.on_quic = lambda _batch: None

    def _receive(self, datagrams: Batch) -> None:
        runs: list[tuple[QuicLink, Address, list[bytes]]] = []
        for datagram, sender in datagrams:
            link = self._route(datagram, sender)
            if link is None:
                continue
            if not runs or (link, sender) != runs[-1][:2]:
                runs.append((link, sender, []))
            runs[-1][2].append(datagram)
        for link in {link: None for link, sender, run in runs if link.receive(run, sender)}:
            link.pump_charged()

    async def dial(self, candidate: Candidate, expect: PeerId) -> QuicLink:
        """Raises WrongPeer, LinkClosed (refused, or closed by the other side)."""
        address = (candidate.host, candidate.port)
        self._dialling[address] += 1
        try:
            is_known = address in self._answered or self._is_talked_to(address)
            if not (is_known or await self._or_refused(address, self._knock(address))):
                raise LinkClosed("who answers there is not a node")
            return await self._begin(address, expect)
        finally:
            self._dialling[address] -= 1
            if not self._dialling[address]:
                del self._dialling[address]
                self._unreachable.pop(address, None)

    async def _begin(self, address: Address, expect: PeerId) -> QuicLink:
        quic = tuning.BoundedConnection(
            configuration=self._configuration(is_client=True, remote=address[0])
        )
        link = self._adopt(quic, Role.DIALLER, address)
        link.urgent = address in self._answered
        self._route_add(link, quic.host_cid)
        try:
            quic.connect(VIRTUAL_ADDRESS, now=trio.current_time())
            self._nursery.start_soon(self._run_link, link)
            link.pump()
            await self._established(link, address)
            self._pin(link, expect)
            self._answered.add(address)
        except OSError as error:
            link.close(CloseCode.REFUSED, "it could not be begun")
            raise unreached(error.errno) from error
        except BaseException:
            link.close(CloseCode.REFUSED, "not the peer that was sought")
            raise
        return link

    async def _established(self, link: QuicLink, address: Address) -> None:
        """Until TLS is complete. Raises LinkClosed when the network or the other side says no."""

        async def settled() -> None:
            async with trio.open_nursery() as nursery:

                async def watch_close() -> None:
                    await link.closed.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(watch_close)
                await link.ready.wait()
                nursery.cancel_scope.cancel()

        await self._or_refused(address, settled())
        if link.closure is not None:
            raise LinkClosed(f"closed by the other side: {link.closure.reason}")

    async def _or_refused(self, address: Address, awaited: Awaitable[Result]) -> Result:
        """Raises Refused, LinkClosed when the network says first that nobody is there."""
        results = []

        async def watch_refusal() -> None:
            while address not in self._unreachable:
                await self._refused.park()
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_refusal)
            results.append(await awaited)
            nursery.cancel_scope.cancel()
        if not results:
            reason = self._unreachable[address]
            raise Refused(reason) if reason == REFUSED else LinkClosed(reason)
        return results[0]

    def _is_talked_to(self, address: Address) -> bool:
        """By a link that is silent now, maybe."""
        return any(
            link.trusted and link.address == address and tuning.path_is_proven(link.quic)
            for link in self._links.values()
        )

    def _pin(self, link: QuicLink, expect: PeerId) -> None:
        certificate = tuning.peer_certificate(link.quic)
        found = certificate_peer(certificate) if certificate is not None else None
        if certificate is None or found != expect:
            raise WrongPeer(expect, found)
        link.binding = certificate_hash(certificate)
        link.trusted = True

    # --- routing ------------------------------------------------------------------------

    def _route(self, datagram: bytes, sender: Address) -> QuicLink | None:
        if len(datagram) < 1 + CID_BYTES:
            return None
        if len(datagram) > MAX_REMOTE_DATAGRAM_BYTES and (
            len(datagram) > quic_size.SAME_MACHINE_DATAGRAM_BYTES
            or not self._is_this_machine(sender[0])
        ):
            return None
        if not datagram[0] & 0x80:  # a short header carries our connection id right away
            return self._links.get(datagram[1 : 1 + CID_BYTES])
        if datagram[1:5] == _VERSION_NEGOTIATION:
            return None  # there is one version: only somebody on the way would name others
        size = datagram[5]
        link = self._links.get(datagram[6 : 6 + size])
        if link is None and len(datagram) >= SMALLEST_MAX_DATAGRAM_SIZE:
            self._welcome(datagram, sender)
        return link

    def _welcome(self, datagram: bytes, sender: Address) -> None:
        """Hear a stranger, unless too many are heard, or those of its network cost too much."""
        try:
            header = pull_quic_header(Buffer(data=datagram), host_cid_length=CID_BYTES)
        except ValueError:
            return
        if (
            header.packet_type is not QuicPacketType.INITIAL
            or header.version != QUIC_VERSION
            or not CID_BYTES <= len(header.destination_cid) <= MAX_CID_BYTES
        ):
            return
        host, now = sender[0], trio.current_time()
        if self._budget.share(network_of(host)).wait_s(now):
            return
        first_cid = self._cid_before_retry(header, sender, now)
        match self._door.knock(host, now, address_checked=first_cid is not None):
            case Verdict.RETRY:
                self._ask_again(header, sender, now)
            case Verdict.HEAR:
                self._hear_first(datagram, sender, header.destination_cid, first_cid)

    def _cid_before_retry(self, header: QuicHeader, sender: Address, now: float) -> bytes | None:
        """The connection id of the first try, when this one bears our token for this address."""
        if not header.token:
            return None
        try:
            return self._tokens.validate_token(
                address=sender, destination_cid=header.destination_cid, token=header.token, now=now
            )
        except ValueError:
            return None

    def _ask_again(self, header: QuicHeader, sender: Address, now: float) -> None:
        """Answer with a token. No state is kept, and the answer is smaller than the question."""
        source_cid = secrets.token_bytes(CID_BYTES)
        token = self._tokens.create_token(
            address=sender,
            original_destination_connection_id=header.destination_cid,
            retry_source_connection_id=source_cid,
            now=now,
        )
        answer = encode_quic_retry(
            version=QUIC_VERSION,
            source_cid=source_cid,
            destination_cid=header.source_cid,
            original_destination_cid=header.destination_cid,
            retry_token=token,
        )
        self._socket.send([answer], sender)

    def _hear_first(
        self, datagram: bytes, sender: Address, cid: bytes, first_cid: bytes | None
    ) -> None:
        quic = tuning.BoundedConnection(
            configuration=self._configuration(is_client=False, remote=sender[0]),
            original_destination_connection_id=first_cid or cid,
            retry_source_connection_id=None if first_cid is None else cid,
        )
        link = self._adopt(quic, Role.LISTENER, sender, charged_to=None if first_cid else cid)
        link.binding = self._identity.certificate_hash
        link.receive([datagram], sender)
        if link.closed.is_set() or not tuning.has_started(quic):
            self._door.leave(sender[0])
            return  # noise that looked like an Initial
        self._route_add(link, cid)
        self._route_add(link, quic.host_cid)
        self._nursery.start_soon(self._run_link, link)
        link.pump_charged()
        self._nursery.start_soon(self._hear, link, sender[0])

    async def _hear(self, link: QuicLink, host: str) -> None:
        try:
            await self._accept(link)
            if link.trusted:
                self._answered.add(link.address)
        finally:
            self._door.leave(host)

    def _adopt(
        self,
        quic: tuning.BoundedConnection,
        role: Role,
        remote: Address,
        charged_to: Hashable = None,
    ) -> QuicLink:
        """`charged_to`: in the network's place, where the address may be forged."""
        tuning.pace(quic, same_machine=self._is_this_machine(remote[0]))
        share = self._budget.share(charged_to or network_of(remote[0]))
        size = DatagramSize(quic, remote, self._is_this_machine, trio.current_time())
        link = QuicLink(quic, role, remote, self._socket.send, share, size)
        link.on_route = lambda cid, add: (
            self._route_add(link, cid) if add else self._route_drop(cid)
        )
        return link

    async def _run_link(self, link: QuicLink) -> None:
        try:
            await link.run()
        finally:
            self._links = {cid: other for cid, other in self._links.items() if other is not link}

    def _route_add(self, link: QuicLink, cid: bytes) -> None:
        self._links[cid] = link

    def _route_drop(self, cid: bytes) -> None:
        self._links.pop(cid, None)

    def _on_unreachable(self, address: Address, reason: str) -> None:
        if address in self._dialling:
            self._unreachable[address] = reason
            self._refused.unpark_all()
        for link in set(self._links.values()):
            if link.address == address:
                link.hint_unreachable()

    def _is_this_machine(self, remote: str) -> bool:
        now = trio.current_time()
        if now >= self._own_until_s:
            self._own = frozenset(self._own_addresses())
            self._own_until_s = now + OWN_ADDRESSES_FRESH_S
        return remote in self._own

    def _configuration(self, *, is_client: bool, remote: str) -> QuicConfiguration:
        near = self._is_this_machine(remote)
        configuration = QuicConfiguration(
            alpn_protocols=[ALPN],
            is_client=is_client,
            congestion_control_algorithm=CONGESTION_CONTROL,
            connection_id_length=CID_BYTES,
            idle_timeout=IDLE_TIMEOUT_S,
            max_datagram_size=quic_size.SAME_MACHINE_DATAGRAM_BYTES if near else BASE_BYTES,
            max_data=tuning.LINK_WINDOW_BYTES,
            max_stream_data=tuning.STREAM_WINDOW_BYTES,
            supported_versions=[QUIC_VERSION],
        )
        if is_client:
            configuration.verify_mode = ssl.CERT_NONE  # the key is pinned instead: see _pin
        else:
            configuration.certificate = self._identity.certificate
            configuration.private_key = self._identity.tls_key
        return configuration
