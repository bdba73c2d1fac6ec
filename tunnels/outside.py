"""How this node looks from outside: asked of servers (stun.py), kept so, told when it changes.

All goes through the node's one UDP socket, for it is that one whose address is wanted: to every
server each CHECK_S and when the network has changed; to one of them each KEEP_ALIVE_S where a NAT
would otherwise forget us (RFC 4787 section 4.3: two minutes, and many know less). Servers that do
not answer, and names that do not resolve, are no errors: less is known then.
"""

from __future__ import annotations

import ipaddress
import logging
import socket as sockets
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import trio

from tunnels.binding import Address
from tunnels.dial import AddressPolicy
from tunnels.door import network_of
from tunnels.meeting import Nats
from tunnels.nat import NatFacts, is_worth_asking, judge
from tunnels.network import Network
from tunnels.peer import Candidate
from tunnels.stun import Server
from tunnels.stun_port import StunPort

CHECK_S = 60.0
CHECK_AGAIN_S = 10.0  # while nobody answers
SILENT_CHECKS = 3  # before that is news
KEEP_ALIVE_S = 25.0
RESOLVE_S = 5.0
NAMES_FRESH_S = 600.0
MAX_SERVERS = 6  # asked, of one IP version; peers among them
MAX_PEERS = 2
VERSIONS = (4, 6)

log = logging.getLogger(__name__)


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


class OutsideView:
    """I know how our socket looks from outside.

    servers: None: nobody is asked, not even peers; others are answered all the same. peers:
    addresses of members, which answer too: one each of MAX_PEERS networks, so that servers have
    room and nobody has two voices. Those on our own networks see no more than we do and are left
    out. policy: of addresses that servers name, those it refuses are no candidates.
    """

    def __init__(
        self,
        network: Network,
        servers: Collection[Server] | None,
        peers: Callable[[], Iterable[Address]] = tuple,
        policy: AddressPolicy = AddressPolicy(),  # noqa: B008 - frozen
        on_change: Callable[[], None] = lambda: None,
        resolve: Resolve = resolve,
    ) -> None:
        self.known = trio.Event()  # two have answered, or all were asked once
        self.checked = trio.Event()  # all were asked once
        self.answers: dict[Address, Address | None] = {}  # of this check: what a server saw
        self.unresolved: tuple[Server, ...] = ()
        self._network = network
        self._servers = servers
        self._peers = peers
        self._policy = policy
        self._on_change = on_change
        self._resolve = resolve
        self._names: dict[Server, _Resolved] = {}
        self._facts = dict.fromkeys(VERSIONS, NatFacts())
        self._silent = dict.fromkeys(VERSIONS, 0)  # checks in a row
        self._bound_host = ""
        self._check_now = trio.Event()

    def facts(self, version: int) -> NatFacts:
        """version: 4 or 6."""
        return self._facts[version]

    def nats(self) -> Nats:
        return Nats(*(self._facts[version].kind for version in VERSIONS))

    def candidates(self) -> list[Candidate]:
        """Where peers may try to reach us through a NAT."""
        return self._candidates("reflexive", lambda facts: facts.reachable_at)

    def guesses(self) -> list[Candidate]:
        """One at each host where a hard NAT was seen. The port there is another peer's."""
        return self._candidates("hard", lambda facts: facts.hard_at)

    def _candidates(
        self, kind: str, of: Callable[[NatFacts], Iterable[Address]]
    ) -> list[Candidate]:
        own = self._network.interface_addresses()
        return [
            Candidate("quic", host, port, kind)
            for facts in self._facts.values()
            for host, port in of(facts)
            if not self._policy.refusal(host, bound_host=self._bound_host, own_addresses=own)
        ]

    def check_now(self) -> None:
        """The network has changed: what we know may be wrong."""
        self._names.clear()
        self._silent = dict.fromkeys(VERSIONS, SILENT_CHECKS)
        self._check_now.set()

    async def run(self, port: StunPort | None) -> None:
        """Until cancelled. Returns at once when nobody is asked, or there is no UDP to ask over."""
        if port is None or self._servers is None:
            self.known.set()
            self.checked.set()
            return
        self._bound_host = port.local[0]
        while True:
            self._check_now = trio.Event()
            await self._check(port, self._servers)
            self.known.set()
            self.checked.set()
            await self._hold(port)

    async def _check(self, port: StunPort, servers: Collection[Server]) -> None:
        """Each is asked as soon as its address is known: a dead name holds up no other."""
        self.answers = {}
        unresolved = set()

        async def look_up(server: Server) -> None:
            places = await self._places_of(server)
            if not places:
                unresolved.add(server)
            for place in places:
                nursery.start_soon(self._hear, port, place)

        async with trio.open_nursery() as nursery:
            for server in servers:
                nursery.start_soon(look_up, server)
            for peer in self._peers_to_ask():
                nursery.start_soon(self._hear, port, peer)
        self.unresolved = tuple(one for one in servers if one in unresolved)
        for version in VERSIONS:
            facts = self._judged(version, port.local[1])
            self._silent[version] = 0 if facts.answered else self._silent[version] + 1
            if not self._may_be_an_outage(version, facts):
                self._learn(version, facts)

    def _peers_to_ask(self) -> list[Address]:
        chosen: dict[int, dict[str, Address]] = {version: {} for version in VERSIONS}
        for peer in self._peers():
            voices = chosen[_version(peer)]
            if len(voices) < MAX_PEERS and not self._network.is_near(peer[0]):
                voices.setdefault(network_of(peer[0]), peer)
        return [peer for voices in chosen.values() for peer in voices.values()]

    def _may_be_an_outage(self, version: int, facts: NatFacts) -> bool:
        """Who answered before may be silent for a while: then what was known stands."""
        was_answered = facts.asked and self._facts[version].answered
        return bool(was_answered) and 0 < self._silent[version] < SILENT_CHECKS

    async def _places_of(self, server: Server) -> Sequence[Address]:
        """Those of last time when it cannot be looked up."""
        known, now = self._names.get(server), trio.current_time()
        if known is not None and known.places and now < known.fresh_until_s:
            return known.places
        places = await self._resolve(server)
        if known is not None and not places:
            return known.places
        self._names[server] = _Resolved(places, now + NAMES_FRESH_S)
        return places

    async def _hear(self, port: StunPort, server: Address) -> None:
        """Two that answer are enough to go on with; the others may mend it."""
        version = _version(server)
        asked = sum(_version(one) == version for one in self.answers)
        if server in self.answers or asked == MAX_SERVERS:
            return
        if not is_worth_asking(server[0], port.local[0], self._network.interface_addresses()):
            return
        self.answers[server] = None
        self.answers[server] = await port.ask(server)
        facts = self._judged(version, port.local[1])
        if facts.answered > 1:
            self._learn(version, facts)
            self.known.set()

    def _judged(self, version: int, own_port: int) -> NatFacts:
        # Sorted: in which order they answered must not look like news.
        ordered = sorted(self.answers.items(), key=lambda answer: answer[0])
        answers = {one: seen for one, seen in ordered if _version(one) == version}
        return judge(answers, self._network.interface_addresses(), own_port)

    def _learn(self, version: int, facts: NatFacts) -> None:
        known, self._facts[version] = self._facts[version], facts
        if facts != known:
            log.info("IPv%d from outside: %s, seen at %s", version, facts.kind.name, facts.mapped)
            self._on_change()

    async def _hold(self, port: StunPort) -> None:
        """Until it is time to check, or there is a reason to. Keeps what a NAT knows of us."""
        answered = any(self.answers.values())
        until_s = trio.current_time() + (CHECK_S if answered else CHECK_AGAIN_S)
        while not self._check_now.is_set() and (now := trio.current_time()) < until_s:
            with trio.move_on_at(min(now + KEEP_ALIVE_S, until_s)) as pause:
                await self._check_now.wait()
            if pause.cancelled_caught and trio.current_time() < until_s:
                await self._keep_alive(port)

    async def _keep_alive(self, port: StunPort) -> None:
        for facts in self._facts.values():
            server = next((one for one, seen in self.answers.items() if seen in facts.mapped), None)
            if not facts.reachable_at or server is None:
                continue
            if await port.ask(server) not in facts.mapped:
                self._check_now.set()


def _version(address: Address) -> int:
    return ipaddress.ip_address(address[0]).version
