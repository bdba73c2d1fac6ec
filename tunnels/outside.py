"""How this node looks from outside: asked of servers (stun.py), kept so, told when it changes.

All goes through the node's one UDP socket, for it is that one whose address is wanted: to every
server each CHECK_S and when the network has changed; to one of them each KEEP_ALIVE_S where a NAT
would otherwise forget us (RFC 4787 section 4.3: two minutes, and many know less). Servers that do
not answer, and names that do not resolve, are no errors: less is known then.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket as sockets
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import trio

from tunnels.binding import Address
from tunnels.demux import SharedSocket
from tunnels.dial import AddressPolicy
from tunnels.errors import BadFrame
from tunnels.nat import NatFacts, is_worth_asking, judge
from tunnels.network import Network
from tunnels.peer import Candidate, format_address
from tunnels.stun import (
    TRANSACTION_BYTES,
    Request,
    Responder,
    Success,
    Transactions,
    is_request,
    parse_untrusted,
)

CHECK_S = 60.0
CHECK_AGAIN_S = 10.0  # while nobody answers
KEEP_ALIVE_S = 25.0
RESOLVE_S = 5.0
NAMES_FRESH_S = 600.0
MAX_SERVERS = 6  # asked, of one IP version
VERSIONS = (4, 6)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Server:
    """host: a name or an address."""

    host: str
    port: int

    def __str__(self) -> str:
        return format_address(self.host, self.port)


Resolve = Callable[[Server], Awaitable[Sequence[Address]]]


async def resolve(server: Server) -> list[Address]:
    """The first address of each IP version; none where the name is not known within RESOLVE_S."""
    found: dict[int, Address] = {}
    with trio.move_on_after(RESOLVE_S):
        try:
            entries = await trio.socket.getaddrinfo(
                server.host, server.port, type=sockets.SOCK_DGRAM
            )
        except (OSError, UnicodeError) as error:  # the latter: no name of a machine
            log.info("the STUN server %s is not known: %s", server, error)
            return []
        for *_, address in entries:
            host = ipaddress.ip_address(str(address[0]).partition("%")[0])
            found.setdefault(host.version, (str(host), server.port))
    return list(found.values())


@dataclass(frozen=True)
class _Resolved:
    places: Sequence[Address]
    fresh_until_s: float


@dataclass
class _Question:
    over: trio.Event = field(default_factory=trio.Event)
    mapped: Address | None = None


class OutsideView:
    """I ask servers how our socket looks from outside, and tell others how theirs does.

    servers: None: nobody is asked, others are answered all the same. peers: addresses of nodes of
    ours, which answer too; those on our own networks see no more than we do and are left out.
    policy: of addresses that servers name, those it refuses are no candidates.
    """

    def __init__(
        self,
        socket: SharedSocket,
        network: Network,
        servers: Collection[Server] | None,
        *,
        peers: Callable[[], Iterable[Address]] = tuple,
        policy: AddressPolicy = AddressPolicy(),  # noqa: B008 - frozen
        resolve: Resolve = resolve,
    ) -> None:
        self.changed = trio.Event()  # another one after each change
        self.checked = trio.Event()  # all were asked once
        self.answers: dict[Address, Address | None] = {}  # of this check: what a server saw
        self.unresolved: tuple[Server, ...] = ()
        self._socket = socket
        self._network = network
        self._servers = servers
        self._peers = peers
        self._policy = policy
        self._resolve = resolve
        self._names: dict[Server, _Resolved] = {}
        self._facts = dict.fromkeys(VERSIONS, NatFacts())
        self._transactions = Transactions()
        self._questions: dict[bytes, _Question] = {}
        self._asked = trio.Event()
        self._check_now = trio.Event()
        self._responder = Responder(trio.current_time())
        socket.on_stun = self._on_stun

    def facts(self, version: int) -> NatFacts:
        """version: 4 or 6."""
        return self._facts[version]

    def candidates(self) -> list[Candidate]:
        """Where peers may try to reach us through a NAT."""
        bound_host, own = self._socket.local[0], self._network.interface_addresses()
        return [
            Candidate("quic", host, port, "reflexive")
            for version in VERSIONS
            for host, port in self._facts[version].reachable_at
            if self._policy.refusal(host, bound_host=bound_host, own_addresses=own) is None
        ]

    def check_now(self) -> None:
        """The network has changed: what we know may be wrong."""
        self._names.clear()
        self._check_now.set()

    async def run(self) -> None:
        """Until cancelled; returns at once when nobody is to be asked."""
        if self._servers is None:
            self.checked.set()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._repeat_questions)
            while True:
                self._check_now = trio.Event()
                await self._check(self._servers)
                self.checked.set()
                await self._hold()

    # --- checking -----------------------------------------------------------------------

    async def _check(self, servers: Collection[Server]) -> None:
        """Each is asked as soon as its address is known: a dead name holds up no other."""
        self.answers = {}
        async with trio.open_nursery() as nursery:
            for server in servers:
                nursery.start_soon(self._ask_named, server)
            for peer in self._peers():
                if not self._network.is_near(peer[0]):
                    nursery.start_soon(self._hear, peer)
        self.unresolved = tuple(one for one in servers if not self._names[one].places)
        for version in VERSIONS:
            self._learn(version, self._judged(version))

    async def _ask_named(self, server: Server) -> None:
        known, now = self._names.get(server), trio.current_time()
        if known is None or not known.places or now > known.fresh_until_s:
            found = await self._resolve(server)
            if found or known is None:
                known = self._names[server] = _Resolved(found, now + NAMES_FRESH_S)
        async with trio.open_nursery() as nursery:
            for place in known.places:
                nursery.start_soon(self._hear, place)

    async def _hear(self, server: Address) -> None:
        """Two that answer are enough to go on with; the others may mend it."""
        bound_host, own = self._socket.local[0], self._network.interface_addresses()
        version = _version(server)
        asked = sum(_version(one) == version for one in self.answers)
        if server in self.answers or asked == MAX_SERVERS:
            return
        if not is_worth_asking(server[0], bound_host, own):
            return
        self.answers[server] = None
        self.answers[server] = await self._ask(server)
        facts = self._judged(version)
        if facts.answered > 1:
            self._learn(version, facts)

    def _judged(self, version: int) -> NatFacts:
        answers = {one: seen for one, seen in self.answers.items() if _version(one) == version}
        return judge(answers, self._network.interface_addresses(), self._socket.local[1])

    def _learn(self, version: int, facts: NatFacts) -> None:
        known, self._facts[version] = self._facts[version], facts
        if facts != known:
            log.info("IPv%d from outside: %s, seen at %s", version, facts.kind.name, facts.mapped)
            self.changed.set()
            self.changed = trio.Event()

    async def _hold(self) -> None:
        """Until it is time to check, or there is a reason to. Keeps what a NAT knows of us."""
        answered = any(facts.answered for facts in self._facts.values())
        until_s = trio.current_time() + (CHECK_S if answered else CHECK_AGAIN_S)
        while not self._check_now.is_set() and (now := trio.current_time()) < until_s:
            with trio.move_on_at(min(now + KEEP_ALIVE_S, until_s)) as pause:
                await self._check_now.wait()
            if pause.cancelled_caught and trio.current_time() < until_s:
                await self._keep_alive()

    async def _keep_alive(self) -> None:
        for facts in self._facts.values():
            server = next((one for one, seen in self.answers.items() if seen in facts.mapped), None)
            if not facts.reachable_at or server is None:
                continue
            if await self._ask(server) not in facts.mapped:
                self._check_now.set()

    # --- questions, and answers to others' ----------------------------------------------

    async def _ask(self, server: Address) -> Address | None:
        """What it saw; None when it is silent, or says that it will not answer."""
        transaction = secrets.token_bytes(TRANSACTION_BYTES)
        question = self._questions[transaction] = _Question()
        self._transactions.ask(server, transaction, trio.current_time())
        self._asked.set()
        try:
            await question.over.wait()
        finally:
            del self._questions[transaction]
        return question.mapped

    async def _repeat_questions(self) -> None:
        while True:
            turn = self._transactions.advance(trio.current_time())
            for datagram, server in turn.sends:
                self._socket.send([datagram], server)
            for transaction in turn.silent:
                self._close(transaction, None)
            with trio.move_on_at(self._transactions.next_deadline()):
                await self._asked.wait()
            self._asked = trio.Event()

    def _close(self, transaction: bytes, mapped: Address | None) -> None:
        question = self._questions.get(transaction)
        if question is not None:
            question.mapped = mapped
            question.over.set()

    def _on_stun(self, datagram: bytes, sender: Address) -> None:
        if is_request(datagram):
            answer = self._responder.answer_untrusted(datagram, sender, trio.current_time())
            if answer is not None:
                self._socket.send([answer], sender)
            return
        try:
            said = parse_untrusted(datagram)
        except BadFrame:
            return
        if not isinstance(said, Request) and self._transactions.settle(said, sender):
            self._close(said.transaction, said.mapped if isinstance(said, Success) else None)


def _version(address: Address) -> int:
    return ipaddress.ip_address(address[0]).version
