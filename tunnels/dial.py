"""Race candidates, keep the winner; decide which peer-supplied addresses may be tried at all."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import trio

from tunnels.binding import REFUSED
from tunnels.errors import DialFailed, HandshakeFailed, TunnelError
from tunnels.link import LINK_KINDS
from tunnels.peer import Candidate, PeerId

STAGGER_S = 0.25  # RFC 8305 (Happy Eyeballs) section 5
GIVE_UP_S = 7.5  # the whole race: nobody at the address is told within 8 s
MAX_CANDIDATES = 32
BEFORE_RELAYS = 2
BEYOND = "it is beyond this machine's own networks, and the node is to stay within (--offline)"
UNKNOWN_RANK = 1000

Result = TypeVar("Result")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_PRIVATE = tuple(
    ipaddress.ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)
_NEVER: tuple[tuple[Network, str], ...] = tuple(
    (ipaddress.ip_network(text), why)
    for text, why in (
        ("0.0.0.0/8", "is not an address of a machine"),
        ("::/128", "is not an address of a machine"),
        ("169.254.0.0/16", "is link-local"),
        ("fe80::/10", "is link-local"),
        ("fec0::/10", "is site-local"),
        ("224.0.0.0/4", "is multicast"),
        ("ff00::/8", "is multicast"),
        ("240.0.0.0/4", "is reserved or broadcast"),
        ("100.100.100.200/32", "is a cloud's metadata service"),  # Alibaba
        ("168.63.129.16/32", "is a cloud's metadata service"),  # Azure
        ("fd00:ec2::/32", "is a cloud's metadata service"),  # Amazon
        ("fd00:c1::a9fe:a9fe/128", "is a cloud's metadata service"),  # Oracle
        ("fd20:ce::254/128", "is a cloud's metadata service"),  # Google
        ("192.0.0.0/24", "is reserved"),
        # IPv4 addresses stand in these, and where is for a translator to say.
        ("64:ff9b:1::/48", "is a translator's"),  # RFC 8215
        ("::ffff:0:0:0/96", "is a translator's"),  # RFC 2765, long obsolete
        ("2001::/32", "is a tunnel's (Teredo)"),  # RFC 4380
    )
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class AddressPolicy:
    """Which addresses named by a peer may be contacted.

    Never: multicast, unspecified, link-local, reserved and metadata addresses. Loopback only
    when our own socket is bound to loopback, private ones only when they are ours too; the two
    flags are the operator's word that they are welcome in any case. only: says which may be at
    all; for a node that keeps to its own networks.

    Ours too is a block (10/8, say) in which we have an address. Where all of ours are private, so
    is every block: behind one router sit others, with blocks of their own. A machine with a public
    address beside them (and the network of its containers) has no such neighbours.
    """

    allow_private: bool = False
    allow_loopback: bool = False
    only: Callable[[str], bool] | None = None

    def refusal(self, host: str, *, bound_host: str, own_addresses: Sequence[str]) -> str | None:
        """Why `host` (an IP literal) may not be contacted, or None when it may.

        bound_host: what our socket is bound to. own_addresses: this machine's.
        """
        for address in _meanings(ipaddress.ip_address(host)):
            for network, why in _NEVER:
                if address in network:
                    return f"not tried: the address {why}"
            if address.is_loopback and not (
                self.allow_loopback or ipaddress.ip_address(bound_host).is_loopback
            ):
                return "not tried: it is the address of this machine itself (loopback)"
            if not self.allow_private and _is_private_elsewhere(address, own_addresses):
                return (
                    "not tried: it is private and this machine is in no such private network; "
                    "allow private addresses if that is meant"
                )
        if self.only is not None and not self.only(host):
            return f"not tried: {BEYOND}"
        return None

    def at(self, bound_host: str, own_addresses: Sequence[str]) -> Callable[[str], str | None]:
        """`refusal` of a host, as things stand now."""

        def refusal(host: str) -> str | None:
            return self.refusal(host, bound_host=bound_host, own_addresses=own_addresses)

        return refusal


def is_private(address: IPAddress) -> bool:
    return any(address in network for network in _PRIVATE)


def _is_private_elsewhere(address: IPAddress, own_addresses: Sequence[str]) -> bool:
    block = next((network for network in _PRIVATE if address in network), None)
    ours = [ipaddress.ip_address(own) for own in own_addresses]
    ours = [own for own in ours if own.version == address.version and not own.is_loopback]
    if block is None or any(own in block for own in ours):
        return False
    return not ours or not all(map(is_private, ours))


def _meanings(address: IPAddress) -> list[IPAddress]:
    """The address and every IPv4 address it stands for: none of them may slip past a rule."""
    meanings: list[IPAddress] = [address]
    if isinstance(address, ipaddress.IPv6Address):
        embedded = [address.ipv4_mapped, address.sixtofour]
        if address in _NAT64 or (int(address) >> 32 == 0 and int(address) > 1):
            embedded.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        meanings += [inner for inner in embedded if inner is not None]
    return meanings


def ranked(candidates: Sequence[Candidate], is_near: Callable[[str], bool]) -> list[Candidate]:
    """In the order in which to try them: addresses as given, near ones first, and for each the best
    kind of link. So the second best address of the best kind does not hold back the next kind,
    which may be the only one that gets through. Relays come after two of them: what leads directly
    may win, and where nothing does, nobody waits for a long list to fail. The port that a hard NAT
    showed somebody else is left out."""
    candidates = [one for one in candidates if one.kind != "hard"]
    hosts = list(dict.fromkeys(one.host for one in candidates))
    near = {host: is_near(host) for host in hosts}
    places = {host: place for place, host in enumerate(hosts)}

    def preference(one: Candidate) -> tuple[bool, int, int]:
        return not near[one.host], places[one.host], rank_of(one, near[one.host])

    direct = sorted((one for one in candidates if one.via is None), key=preference)
    relayed = [one for one in candidates if one.via is not None]
    return [*direct[:BEFORE_RELAYS], *relayed, *direct[BEFORE_RELAYS:]]


def rank_of(candidate: Candidate, near: bool) -> int:
    """Of the link that it would lead to: a lower one is better."""
    kind = LINK_KINDS.get(candidate.transport)
    return UNKNOWN_RANK if kind is None else kind.rank_when(near)


async def race(
    peer: PeerId,
    candidates: Sequence[Candidate],
    attempt: Callable[[Candidate], Awaitable[Result]],
    discard: Callable[[Result], None],
) -> Result:
    """The first success of `attempt`, started for each candidate STAGGER_S after the last, or at
    once when one fails. The others are cancelled; one that succeeds all the same goes to
    `discard`. Raises DialFailed with every reason.
    """
    candidates = list(dict.fromkeys(candidates))[:MAX_CANDIDATES]
    failures: dict[Candidate, str] = {}
    heard: set[Candidate] = set()
    results: list[Result] = []
    failed = trio.Event()

    async def run(candidate: Candidate) -> None:
        nonlocal failed
        try:
            result = await attempt(candidate)
        except TunnelError as error:
            failures[candidate] = str(error)
            if isinstance(error, HandshakeFailed) or str(error) == REFUSED:
                heard.add(candidate)
            failed.set()
            failed = trio.Event()
            return
        results.append(result)
        nursery.cancel_scope.cancel()

    with trio.move_on_after(GIVE_UP_S):
        async with trio.open_nursery() as nursery:
            for candidate in candidates:
                nursery.start_soon(run, candidate)
                with trio.move_on_after(STAGGER_S):
                    await failed.wait()
    for late in results[1:]:
        discard(late)
    if results:
        return results[0]
    nobody = f"nobody answered within {GIVE_UP_S:.0f} s"
    raise DialFailed(
        peer,
        [(one, failures.get(one, nobody)) for one in candidates],
        unheard=[one for one in candidates if one not in heard],
    )
