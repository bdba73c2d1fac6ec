"""An internet for a fake world: networks behind NATs and firewalls, down to the single machine.

    internet = Internet(world)
    home = internet.network(Router("11.0.1.1", Kind.HOME))
    alice = internet.host("192.168.1.2", behind=home)

A `Network` is a set of hosts; its router stands between it and the network above, the internet at
last. Addresses are unique in the world, private ones too. A datagram climbs until its target is in
sight, translated by each router on the way; it goes down again only through routers that let it in.
Outbound it is translated when it leaves, inbound when it lands: what is opened while it flies
counts, as it does outside.

What the kinds do is RFC 4787's: mapping (4.1) and filtering (5). Ports are kept where they are
free, by SYMMETRIC never. Every mapping, every permission to come in, is forgotten after `timeout_s`
of silence. Each router has dice of its own: what others do does not change how its own fall.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

import trio

from tests.lab.datagrams import FakeHost, World
from tunnels.binding import Address

TIMEOUT_S = 120.0
FIRST_PORT, LAST_PORT = 1024, 65535


class Kind(Enum):
    FULL_CONE = "one mapping for all, open to all"
    ADDRESS_RESTRICTED = "one mapping, open to hosts that were sent to"
    PORT_RESTRICTED = "one mapping, open to addresses that were sent to"
    SYMMETRIC = "a random port for each destination, open to that one"
    HOME = "plain Linux: a mapping for each flow, the port kept where it is free; the router drops"
    LEAKY_HOME = "the same, but what nobody asked for takes its place in the table"
    FIREWALL = "no translation: what was not asked for is dropped"

    @property
    def is_hard(self) -> bool:
        return self is Kind.SYMMETRIC


class Memory:
    """What was heard or said a while ago is forgotten."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._until_s: dict[Hashable, float] = {}

    def __contains__(self, key: Hashable) -> bool:
        return self._until_s.get(key, -math.inf) > trio.current_time()

    def touch(self, key: Hashable) -> None:
        self._until_s[key] = trio.current_time() + self._timeout_s

    def clear(self) -> None:
        self._until_s.clear()


@dataclass
class Router:
    """address: its own on the network above. hairpin: turns back what its own network sends to
    that address. blocks_udp: nothing of UDP passes, TCP does. rejects: what it does not let in, it
    answers with an error, where others drop it. forwards: where ports lead that a host inside has
    asked for, of UDP and TCP alike."""

    address: str
    kind: Kind
    hairpin: bool = False
    timeout_s: float = TIMEOUT_S
    blocks_udp: bool = False
    rejects: bool = False
    forwards: dict[int, Address] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ports: dict[Hashable, int] = {}  # of a mapping
        self._inside: dict[tuple[int, Address | None], Address] = {}  # behind it
        self._alive = Memory(self.timeout_s)
        self._keeps_ports = True
        self.dice = random.Random()

    def rebind(self) -> None:
        """All mappings are forgotten, and new ones get other ports: as after a restart."""
        self._ports.clear()
        self._inside.clear()
        self._alive.clear()
        self._keeps_ports = False

    def forget(self) -> None:
        """All mappings are forgotten: as `conntrack -F` does."""
        self.rebind()
        self._keeps_ports = True

    def restart(self) -> None:
        """What hosts had it forward is forgotten as well, until they ask again."""
        self.rebind()
        self.forwards.clear()

    # --- out ----------------------------------------------------------------------------

    def outbound(self, source: Address, target: Address) -> Address | None:
        """The source as the network above sees it."""
        if self.blocks_udp:
            return None
        if self.kind is Kind.FIREWALL or ":" in source[0]:
            self._alive.touch((source, target))
            return source
        for port, inside in self.forwards.items():
            if inside == source:
                return self.address, port
        mapping = (source, self._remote(target))
        if mapping not in self._alive:
            self._let_go(mapping)
            port = self._free_port(source[1], self._remote(target))
            self._ports[mapping] = port
            self._inside[port, self._remote(target)] = source
        port = self._ports[mapping]
        self._alive.touch(mapping)
        self._alive.touch((port, target))
        self._alive.touch((port, target[0]))
        return self.address, port

    def _remote(self, target: Address) -> Address | None:
        """What a mapping is for, beside the address inside: all the world, or one destination."""
        for_each = (Kind.SYMMETRIC, Kind.HOME, Kind.LEAKY_HOME)
        return target if self.kind in for_each else None

    def _let_go(self, mapping: tuple[Address, Address | None]) -> None:
        if (port := self._ports.pop(mapping, None)) is not None:
            self._inside.pop((port, mapping[1]), None)

    def _free_port(self, wanted: int, remote: Address | None) -> int:
        port = wanted
        if self.kind is Kind.SYMMETRIC or not self._keeps_ports:
            port = self.dice.randint(FIRST_PORT, LAST_PORT)
        while self._is_taken(port, remote):
            port = self.dice.randint(FIRST_PORT, LAST_PORT)
        return port

    def _is_taken(self, port: int, remote: Address | None) -> bool:
        inside = self._inside.get((port, remote))
        if inside is not None and (inside, remote) in self._alive:
            return True
        return ("leaked", port, remote) in self._alive

    # --- in -----------------------------------------------------------------------------

    def inbound(self, source: Address, target: Address) -> Address | None:
        """Where inside it goes; None: dropped."""
        if self.blocks_udp:
            return None
        if self.kind is Kind.FIREWALL or ":" in target[0]:
            return target if (target, source) in self._alive else None
        port = target[1]
        if port in self.forwards:
            return self.forwards[port]
        remote = self._remote(source)
        inside = self._inside.get((port, remote))
        mapping = (inside, remote)
        if inside is None or mapping not in self._alive:
            if self.kind is Kind.LEAKY_HOME:
                self._alive.touch(("leaked", port, source))
            return None
        if not self._lets_in(port, source):
            return None
        self._alive.touch(mapping)
        self._alive.touch((port, source))
        self._alive.touch((port, source[0]))
        return inside

    def _lets_in(self, port: int, source: Address) -> bool:
        match self.kind:
            case Kind.FULL_CONE:
                return True
            case Kind.ADDRESS_RESTRICTED:
                return (port, source[0]) in self._alive
            case _:
                return (port, source) in self._alive


@dataclass(eq=False)
class Network:
    """router, above: None for the internet itself."""

    router: Router | None = None
    above: Network | None = None
    hosts: set[str] = field(default_factory=set)
    below: list[Network] = field(default_factory=list)

    def sees(self, host: str) -> bool:
        """Whether it is here, or below with nothing but firewalls between."""
        return host in self.hosts or self.way_down_to(host) is not None

    def way_down_to(self, host: str) -> Network | None:
        for network in self.below:
            router = network.router
            assert router is not None
            translates = router.kind is not Kind.FIREWALL and ":" not in host
            if host == router.address or (not translates and network.sees(host)):
                return network
        return None


class Internet:
    """I say which way a world's packets go. Installed in the world when made."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.top = Network()
        self.stealthy: dict[str, Memory] = {}  # hosts that drop what they did not ask for
        self._of_host: dict[str, Network] = {}
        self._family: dict[str, tuple[str, ...]] = {}  # all addresses of a machine
        world.internet = self

    def network(self, router: Router, above: Network | None = None) -> Network:
        above = above or self.top
        router.dice.seed(f"{self.world.seed} {router.address}")
        network = Network(router, above)
        above.below.append(network)
        return network

    def host(
        self,
        *addresses: str,
        behind: Network | None = None,
        stealth: bool = False,
        near: str | None = None,
    ) -> FakeHost:
        """Sockets are bound to the first address; datagrams to and from the others are theirs."""
        network = behind or self.top
        for address in addresses:
            network.hosts.add(address)
            self._of_host[address] = network
            self._family[address] = addresses
        if stealth:
            self.stealthy[addresses[0]] = Memory(TIMEOUT_S)
        return FakeHost(self.world, list(addresses), near)

    def move(self, old: str, new: str) -> None:
        """The machine has another address, on the same network."""
        network = self._of_host.pop(old)
        network.hosts.remove(old)
        network.hosts.add(new)
        self._of_host[new] = network
        self._family[new] = tuple(new if one == old else one for one in self._family.pop(old))

    def network_of(self, host: FakeHost) -> Network:
        return self._of_host[host.addresses[0]]

    # --- datagrams ----------------------------------------------------------------------

    def climb(self, sender: Address, target: Address) -> tuple[Address, Network] | None:
        """Of what leaves: its source as seen at the highest network it gets to, and that network.
        None: it got lost."""
        source = self._speaking(sender, target[0])
        network = self._of_host.get(sender[0], self.top)
        if source is None:
            return None
        if (memory := self.stealthy.get(sender[0])) is not None:
            memory.touch((sender[1], target))
        while not network.sees(target[0]):
            if network.router is None or network.above is None:
                return None
            seen = network.router.outbound(source, target)
            turned_back = target[0] == network.router.address
            if seen is None or (turned_back and not network.router.hairpin):
                return None
            source, network = seen, network.above
        return source, network

    def descend(self, source: Address, target: Address, network: Network) -> Address | None:
        """Of what lands: the socket it is for. None: dropped."""
        while target[0] not in network.hosts:
            below = network.way_down_to(target[0])
            if below is None or below.router is None:
                return None
            inside = below.router.inbound(source, target)
            if inside is None:
                return None
            target, network = inside, below
        first = self._family[target[0]][0]
        memory = self.stealthy.get(first)
        if memory is not None and (target[1], source) not in memory:
            return None
        return first, target[1]

    def refuses(self, target: Address) -> bool:
        """Whether a router says so where it does not let in what is for it."""
        below = self.top.way_down_to(target[0])
        return below is not None and below.router is not None and below.router.rejects

    def _speaking(self, sender: Address, to: str) -> Address | None:
        """The sender's address of the target's family."""
        family = self._family.get(sender[0], (sender[0],))
        return next(((one, sender[1]) for one in family if (":" in one) == (":" in to)), None)

    # --- TCP ----------------------------------------------------------------------------

    def connection(self, sender: Address, target: Address) -> tuple[Address, Address] | None:
        """The source that a listener sees of a connection, and the listener's own address; None: it
        never arrives. Nothing comes in through a NAT or a firewall that was not asked for."""
        network = self._of_host.get(sender[0], self.top)
        source = self._speaking(sender, target[0])
        if source is None:
            return None
        while not network.sees(target[0]):
            if network.router is None or network.above is None:
                return None
            if network.router.kind is not Kind.FIREWALL and ":" not in source[0]:
                source = (network.router.address, self.world.free_port())
            network = network.above
        below = network.way_down_to(target[0])
        if below is not None and below.router is not None and target[1] in below.router.forwards:
            target, network = below.router.forwards[target[1]], below
        if target[0] not in network.hosts or self._family[target[0]][0] in self.stealthy:
            return None
        return source, (self._family[target[0]][0], target[1])
