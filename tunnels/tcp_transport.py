"""TLS connections over TCP: dialling, accepting, and which link a connection belongs to.

A connection from outside is a stranger's until its first message is in: BEGIN makes it a link's
control connection, and then it stays one until the peer has proven its key; JOIN brings it to the
link it names. The door (door.py) says which strangers are heard: TCP has checked their address.
From a network where a peer of a standing link is, further connections are heard beside it.
"""

from __future__ import annotations

import logging
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import trio

from tunnels.allowance import Buckets, Budget, Rate, Share
from tunnels.binding import Address, KnownAddresses
from tunnels.door import Door, Verdict, network_of
from tunnels.errors import BadFrame, LinkClosed, WrongPeer
from tunnels.handshake import Role
from tunnels.identity import Identity, certificate_hash, certificate_peer
from tunnels.link import Accept
from tunnels.network import Network
from tunnels.peer import Candidate, PeerId
from tunnels.tcp import UNPROVEN_BYTES, TcpLink
from tunnels.tcp_connection import Connection
from tunnels.tcp_socket import RECEIVE_BYTES, ByteSocket, Listener, connect_soon
from tunnels.tcp_wire import Begin, Join, MessageDecoder, encode
from tunnels.tls import Tls, dialler_context

FIRST_WORDS_TIMEOUT_S = 5.0  # from a connection to its BEGIN or JOIN
MAX_JOINING_PER_NETWORK = 64  # connections of peers' networks that have not said JOIN yet
JOINING = Rate(per_s=50, burst=256)  # of them, a network

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Way:
    """How to get a connection. suspect: called when what came over it was not from the peer."""

    connect: Callable[[], Awaitable[ByteSocket]]
    suspect: Callable[[], None] = lambda: None


class TcpTransport:
    """I own the links of one node. `accept` is called for each that a stranger opens; it returns
    when the stranger has proven itself or is gone.

    tls: for those who connect to us. budget: what all links of the node share (allowance.py).
    """

    link_class = TcpLink

    def __init__(
        self,
        identity: Identity,
        network: Network,
        nursery: trio.Nursery,
        accept: Accept,
        listener: Listener,
        tls: ssl.SSLContext,
        budget: Budget,
        second_listener: Listener | None = None,
    ) -> None:
        self._identity = identity
        self._network = network
        self._nursery = nursery
        self._accept = accept
        self._listener = listener
        self._listeners = [one for one in (listener, second_listener) if one is not None]
        self._budget = budget
        self._door = Door(trio.current_time())
        self._answered = KnownAddresses()
        self._stopped = False
        self._joining: Counter[str] = Counter()
        self._joins = Buckets(JOINING)
        self._links: dict[bytes, TcpLink] = {}  # by id, those that peers dialled
        self._running: set[TcpLink] = set()
        self._listener_context = tls
        self._dialler_context = dialler_context()

    @property
    def port(self) -> int:
        return self._listener.local[1]

    async def run(self) -> None:
        """Accept connections until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                for listener in self._listeners:
                    nursery.start_soon(self._listen, listener)
        finally:
            self._stopped = True

    async def _listen(self, listener: Listener) -> None:
        while True:
            self._welcome(await listener.accept())

    def _welcome(self, socket: ByteSocket) -> None:
        host, now = socket.remote[0], trio.current_time()
        network = network_of(host)
        if self._is_peers_network(network, now):
            # At the expense of that network's joins: strangers there cannot use up what the
            # peer has for its streams, nor the other way round.
            share = self._budget.share(("joining", network))
            self._joining[network] += 1
            self._spawn(partial(self._hear, socket, share, self._leave_joining))
            return
        share = self._budget.share(network)  # those of it may have cost too much already
        if (
            not share.wait_s(now)
            and self._door.knock(host, now, address_checked=True) is Verdict.HEAR
        ):
            self._spawn(partial(self._hear, socket, share, self._door.leave))
        else:
            socket.reset()

    async def dial(self, candidate: Candidate, expect: PeerId) -> TcpLink:
        """Raises WrongPeer, LinkClosed (refused, or closed by the other side)."""
        address = (candidate.host, candidate.port)
        way = Way(partial(self._connect_to, address))
        share = self._budget.share(network_of(candidate.host))
        link = await self._dial_link(way, expect, share)
        self._answered.add(address)
        return link

    async def _dial_link(self, way: Way, expect: PeerId, share: Share) -> TcpLink:
        connection, binding = await self._dial(way, expect, share)
        if self._stopped:
            connection.lose("this node has stopped")
            raise LinkClosed("this node has stopped")
        connection.send(encode(Begin()))

        async def another() -> Connection:
            further, found = await self._dial(way, expect, link.share)
            if found != binding:
                further.reset("another certificate of the same key")
                raise LinkClosed("the other side shows another certificate than before")
            return further

        link = self._start(connection, Role.DIALLER, binding, another)
        link.trusted = True
        return link

    # --- connections --------------------------------------------------------------------

    async def _dial(self, way: Way, expect: PeerId, share: Share) -> tuple[Connection, bytes]:
        """A connection whose far end holds `expect`'s key, and the hash of its certificate."""
        socket = await way.connect()
        tls = Tls(self._dialler_context, listens=False)
        connection = Connection(socket, tls, share, self._spawn)
        try:
            await connection.establish()
            certificate = connection.tls.peer_certificate
            found = certificate_peer(certificate) if certificate is not None else None
            if certificate is None or found != expect:
                raise WrongPeer(expect, found)
        except BaseException as error:
            if tls.broken or isinstance(error, WrongPeer):
                way.suspect()
            connection.reset("not the peer that was sought")
            raise
        return connection, certificate_hash(certificate)

    async def _connect_to(self, address: Address) -> ByteSocket:
        connect = partial(self._network.connect, address)
        return await (connect_soon(connect) if address in self._answered else connect())

    async def _hear(self, socket: ByteSocket, share: Share, leave: Callable[[str], None]) -> None:
        host = socket.remote[0]
        tls = Tls(self._listener_context, listens=True)
        connection = Connection(socket, tls, share, self._spawn)
        # Of a JOIN's connection the first bytes of the stream may come along.
        connection.may_send_bytes = UNPROVEN_BYTES + RECEIVE_BYTES
        taken = False
        try:
            decoder = MessageDecoder()
            with trio.move_on_after(FIRST_WORDS_TIMEOUT_S):
                first = await _first_message(connection, decoder)
                taken = True
                if isinstance(first, Join):
                    self._join(first, connection, decoder.rest)
                else:
                    connection.push_back(decoder.rest)
            if taken and isinstance(first, Begin):
                link = self._start(
                    connection, Role.LISTENER, self._identity.certificate_hash, _nobody_dials
                )
                await self._accept(link)
        except (BadFrame, LinkClosed) as error:
            log.debug("a connection from %s was not accepted: %s", host, error)
            taken = False
        finally:
            leave(host)
            if not taken:
                connection.reset("it did not become part of a link")

    def _join(self, message: Join, connection: Connection, rest: bytes) -> None:
        link = self._links.get(message.link)
        refusal = "there is no such link" if link is None else link.join(message, connection)
        if refusal is not None:
            raise LinkClosed(refusal)
        connection.push_back(rest)

    # --- links --------------------------------------------------------------------------

    def _start(
        self,
        connection: Connection,
        role: Role,
        binding: bytes,
        dial: Callable[[], Awaitable[Connection]],
    ) -> TcpLink:
        link = self.link_class(
            connection,
            role,
            binding,
            near=self._is_near(connection.socket.remote[0]),
            dial=dial,
            register=self._links.__setitem__,
            spawn=self._spawn,
        )
        self._running.add(link)
        self._spawn(partial(self._run_link, link))
        return link

    def _is_near(self, host: str) -> bool:
        return self._network.is_near(host)

    async def _run_link(self, link: TcpLink) -> None:
        try:
            await link.run()
        finally:
            self._running.discard(link)
            self._links.pop(link.id, None)

    def _spawn(self, task: Callable[[], Awaitable[None]]) -> bool:
        """A bug that a peer's bytes bring to light ends its connection, not the node. False when
        the node has stopped."""

        async def contained() -> None:
            try:
                await task()
            except Exception:
                log.exception("a task of a connection failed")

        if not self._stopped:
            self._nursery.start_soon(contained)
        return not self._stopped

    # --- the door -----------------------------------------------------------------------

    def _is_peers_network(self, network: str, now: float) -> bool:
        known = any(network_of(one.host) == network for one in self._links.values())
        return (
            known
            and self._joining[network] < MAX_JOINING_PER_NETWORK
            and self._joins.take(network, now)
        )

    def _leave_joining(self, host: str) -> None:
        network = network_of(host)
        self._joining[network] -= 1
        if not self._joining[network]:
            del self._joining[network]


async def _first_message(connection: Connection, decoder: MessageDecoder) -> Begin | Join:
    """Raises LinkClosed, BadFrame."""
    await connection.establish()
    while True:
        message = decoder.next_untrusted()
        if isinstance(message, Begin | Join):
            return message
        if message is not None:
            raise BadFrame(f"a {type(message).__name__} message opens a connection")
        data = await connection.receive()
        if not data:
            raise LinkClosed("the other side said nothing")
        decoder.feed(data)


async def _nobody_dials() -> Connection:
    raise LinkClosed("only the side that dialled a link makes connections for it")
