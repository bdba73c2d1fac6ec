"""An internet of our own: servers that all can reach, and sites of each kind, a wire away.

    with internet() as net:
        alice, bob = net.site("home"), net.site("sym")

A site is one customer: a host, or two, and what stands before them. Its wire is number n, its
public network 11.0.n.0/24 and 2600:11:n::/64; behind a router it is 192.168.1.0/24, as everywhere.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import require
from tests.netlab import nats
from tests.netlab.netns import Namespace, cable, can_be_made, delete, make
from tests.netlab.wire import Wires

AT_ONCE = "nodad"
"""An address of IPv6 that is good from the start. Else it is "tentative" for a moment, even where
nobody looks for duplicates, and what is sent then comes from nowhere (::) and is dropped."""
DELAY_S = 0.01  # of each site's wire, one way: 40 ms there and back between two
SERVERS, RELAYS = 250, 251  # numbers of their wires
STUN = ("11.0.250.2", "11.0.250.3")
STUN6 = ("2600:11:250::2", "2600:11:250::3")
STUN_PORT = 3478
RELAY, RELAY6 = "11.0.251.2", "2600:11:251::2"
SHORT_MAPPING_S = 15
_labs = itertools.count()


@dataclass
class Site:
    """hosts: where nodes run. routers: what is between them and the wire, the outermost last."""

    kind: str
    number: int
    name: str
    middle: Namespace
    wires: Wires
    hosts: list[Namespace] = field(default_factory=list)
    routers: list[Namespace] = field(default_factory=list)

    @property
    def host(self) -> Namespace:
        return self.hosts[0]

    @property
    def outermost(self) -> Namespace:
        return self.routers[-1] if self.routers else self.host

    @property
    def wan(self) -> str:
        return f"11.0.{self.number}.2"

    @property
    def wan6(self) -> str:
        return f"2600:11:{self.number}::2"

    def weather(self, **weather: float | bool) -> None:
        """Of its wire, from now on: fields of wire.Weather."""
        self.wires.set(self.name, **weather)

    def forget_mappings(self) -> None:
        """As a router does that was restarted."""
        for space in (*self.hosts, *self.routers):
            space.run("conntrack", "-F")

    def swallow_above(self, size_bytes: int) -> None:
        """A black hole: larger packets go, and nobody is told."""
        self.middle.nft(
            f"table inet hole_{self.name} {{\n chain forward {{\n"
            f"type filter hook forward priority -200\n"
            f"iifname {self.name} meta length > {size_bytes} drop\n"
            f"oifname {self.name} meta length > {size_bytes} drop\n }}\n}}\n"
        )

    def heal(self) -> None:
        """No black hole any more."""
        self.middle.nft(f"delete table inet hole_{self.name}\n")


class Internet:
    """I own the namespaces of one lab, and the process of its wires."""

    def __init__(self) -> None:
        self._mark = f"nl{os.getpid()}x{next(_labs)}"
        self._spaces: list[Namespace] = []
        self._numbers = itertools.count(1)
        self.wires = Wires()

    def lay(self) -> None:
        """What all sites share."""
        self.middle, self.servers, self.relay = self._make("net", "srv", "rly")
        self.middle.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
        # What has no public address to go to is lost without a word, as in most of the world.
        self.middle.ip("route add blackhole default", "route add blackhole ::/0")
        self._uplink(self.servers, "srv", SERVERS)
        self.servers.ip(
            f"addr add {STUN[1]}/24 dev wan", f"addr add {STUN6[1]}/64 dev wan {AT_ONCE}"
        )
        self._uplink(self.relay, "rly", RELAYS)

    def site(self, kind: str) -> Site:
        number = next(self._numbers)
        site = Site(kind, number, f"s{number}", self.middle, self.wires)
        BUILDERS[kind](self, site)
        return site

    def add_host(self, site: Site) -> Namespace:
        (host,) = self._make(f"{site.name}h{len(site.hosts)}")
        site.hosts.append(host)
        return host

    def add_router(self, site: Site) -> Namespace:
        (router,) = self._make(f"{site.name}r{len(site.routers)}")
        router.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
        site.routers.append(router)
        return router

    def uplink(self, site: Site, families: str = "46") -> None:
        self._uplink(site.outermost, site.name, site.number, families=families)
        self.wires.set(site.name, delay_s=DELAY_S)

    def close(self) -> None:
        self.wires.close()
        delete(self._spaces)

    def _make(self, *names: str) -> list[Namespace]:
        made = make(f"{self._mark}{name}" for name in names)
        self._spaces += made
        return made

    def _uplink(
        self,
        space: Namespace,
        name: str,
        number: int,
        *,
        families: str = "46",
        delayed: bool = False,
    ) -> None:
        """A wire to the middle; `wan` at this end."""
        self.wires.add(name, (space, "wan"), (self.middle, name))
        networks = {"4": f"11.0.{number}.", "6": f"2600:11:{number}::"}
        lengths = {"4": "24", "6": "64"}
        flags = {"4": "", "6": AT_ONCE}
        here, there = ["link set wan up"], [f"link set {name} up"]
        for family in families:
            network, length, flag = networks[family], lengths[family], flags[family]
            here.append(f"addr add {network}2/{length} dev wan {flag}")
            here.append(_default(f"{network}1", "wan"))
            there.append(f"addr add {network}1/{length} dev {name} {flag}")
        space.ip(*here)
        self.middle.ip(*there)


@contextmanager
def internet() -> Iterator[Internet]:
    """Needs root, iproute2, nftables, conntrack and TUN."""
    reason = "needs root, iproute2, nftables and conntrack (./just setup)"
    require("namespaces", can_be_made(), reason)
    require("tun", Path("/dev/net/tun").exists(), "needs /dev/net/tun")
    net = Internet()
    try:
        net.lay()
        yield net
    finally:
        net.close()


# --- what each kind is built of --------------------------------------------------------------


def _bare(net: Internet, site: Site) -> None:
    net.add_host(site)
    net.uplink(site)


def _stealth(net: Internet, site: Site) -> None:
    _bare(net, site)
    site.host.nft(nats.STEALTH)


def _broken4(net: Internet, site: Site) -> None:
    """An address of IPv4 that somebody's router gave, and a way out that ends there."""
    _bare(net, site)
    net.middle.nft(nats.leads_nowhere(site.name))


def _behind(rules: Callable[[Site], str]) -> Callable[[Internet, Site], None]:
    """One host behind one router with these rules."""

    def build(net: Internet, site: Site) -> None:
        host, router = net.add_host(site), net.add_router(site)
        net.uplink(site, "4")
        _lan(router, "lan", "192.168.1", [(host, site.number)])
        router.nft(rules(site))

    return build


def _short(net: Internet, site: Site) -> None:
    _behind(lambda _: nats.home())(net, site)
    for timeout in ("udp_timeout", "udp_timeout_stream"):
        site.routers[0].sysctl(**{f"netfilter__nf_conntrack_{timeout}": SHORT_MAPPING_S})


def _cgnat(net: Internet, site: Site) -> None:
    host, router, carrier = net.add_host(site), net.add_router(site), net.add_router(site)
    net.uplink(site, "4")
    cable(router, "wan", carrier, "lan")
    carrier.ip(f"addr add 100.64.{site.number}.1/24 dev lan")
    router.ip(f"addr add 100.64.{site.number}.2/24 dev wan")
    router.ip(_default(f"100.64.{site.number}.1", "wan"))
    _lan(router, "lan", "192.168.1", [(host, site.number)])
    router.nft(nats.home())
    carrier.nft(nats.home())


def _ipv6(net: Internet, site: Site) -> None:
    host, router = net.add_host(site), net.add_router(site)
    net.uplink(site, "6")
    cable(router, "lan", host, "e0")
    network = f"2600:11:{site.number}:1"
    router.ip(f"addr add {network}::1/64 dev lan {AT_ONCE}")
    host.ip(f"addr add {network}::2/64 dev e0 {AT_ONCE}", _default(f"{network}::1", "e0"))
    net.middle.ip(f"route add {network}::/64 via {site.wan6}")
    router.nft(nats.IPV6_FIREWALL)


def _two(network: str, *, hairpin: bool) -> Callable[[Internet, Site], None]:
    """A second host on the LAN, or on a guest network."""

    def build(net: Internet, site: Site) -> None:
        one, other, router = net.add_host(site), net.add_host(site), net.add_router(site)
        net.uplink(site, "4")
        if network == "lan":
            _lan(router, "lan", "192.168.1", [(one, 10), (other, 11)])
        else:
            _lan(router, "lan", "192.168.1", [(one, 10)])
            _lan(router, "guest", "192.168.2", [(other, 10)])
        router.nft(nats.cone(site.wan, hairpin=hairpin))

    return build


def _lan(router: Namespace, name: str, network: str, hosts: list[tuple[Namespace, int]]) -> None:
    """A bridge in the router, and hosts on it with these last numbers of their addresses."""
    # What crosses the bridge is none of the router's firewall's business.
    router.sysctl(**{"bridge__bridge-nf-call-iptables": 0})
    router.ip(
        f"link add {name} type bridge mcast_snooping 0 forward_delay 0",
        f"link set {name} up",
        f"addr add {network}.1/24 dev {name}",
    )
    for host, number in hosts:
        cable(router, f"{name}{number}", host, "e0")
        router.ip(f"link set {name}{number} master {name}")
        host.ip(f"addr add {network}.{number + 1}/24 dev e0", _default(f"{network}.1", "e0"))


def _default(gateway: str, interface: str) -> str:
    return f"route add default via {gateway} dev {interface}"


BUILDERS: dict[str, Callable[[Internet, Site], None]] = {
    "open": _bare,
    "full": _behind(lambda site: nats.cone(site.wan)),
    "addr": _behind(lambda site: nats.cone(site.wan, restricted=True)),
    "port": _behind(lambda site: nats.port_restricted(site.wan)),
    "home": _behind(lambda _: nats.home()),
    "sym": _behind(lambda _: nats.symmetric()),
    "stealth": _stealth,
    "blocked": _behind(lambda _: nats.WEB_ONLY),
    "cgnat": _cgnat,
    "ipv6": _ipv6,
    "broken4": _broken4,
    "short": _short,
    "upnp": _behind(lambda _: nats.home()),
    "lan": _two("lan", hairpin=False),
    "lan-hairpin": _two("lan", hairpin=True),
    "guest": _two("guest", hairpin=False),
    "guest-hairpin": _two("guest", hairpin=True),
}
