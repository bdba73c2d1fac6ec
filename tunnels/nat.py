"""What lies between a socket and the world, told from what several servers see of it. Sans-IO.

Servers elsewhere say from which address our datagrams come (stun.py). Compared with each other and
with our own addresses, that tells how a NAT on the way maps (RFC 4787 section 4.1):

| what they see | kind |
|---|---|
| one of our own addresses | NONE: no NAT; a firewall there may be all the same |
| the same address, at two servers or more on different hosts | EASY |
| another one each | HARD |
| one server answered | UNKNOWN |
| two or more were asked, and none answered | BLOCKED |

A server may lie. So an address counts as ours once two hosts agree on it, or while there is but one
to ask; and one liar among three does not change the kind.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from tunnels.binding import Address
from tunnels.peer import NatKind

MAX_MAPPED = 2  # of an EASY NAT: a network with two ways out


@dataclass(frozen=True)
class NatFacts:
    """Of one socket and one IP version.

    mapped: our socket as servers saw it, what most of them saw first. keeps_port: whether the port
    there is our own; None when nobody said. asked, answered: how many servers; they say nothing of
    the NAT, so facts that differ in these alone are equal.
    """

    kind: NatKind = NatKind.UNKNOWN
    mapped: tuple[Address, ...] = ()
    keeps_port: bool | None = None
    asked: int = field(default=0, compare=False)
    answered: int = field(default=0, compare=False)

    @property
    def reachable_at(self) -> tuple[Address, ...]:
        """Where peers may try to reach us from outside. A HARD NAT lets only those in whom it made
        an address for; without a NAT our own addresses say it all."""
        if self.kind in (NatKind.EASY, NatKind.UNKNOWN):
            return self.mapped[:MAX_MAPPED]
        return ()

    @property
    def hard_at(self) -> tuple[Address, ...]:
        """Of a HARD NAT, an address on each of its hosts."""
        if self.kind is not NatKind.HARD:
            return ()
        by_host = {host: (host, port) for host, port in reversed(self.mapped)}
        return tuple(by_host.values())[-MAX_MAPPED:]


def judge(
    answers: Mapping[Address, Address | None], own_hosts: Collection[str], own_port: int
) -> NatFacts:
    """answers: by server, what it saw; None of one that was silent."""
    seen = {server: mapped for server, mapped in answers.items() if mapped is not None}
    hosts = {host for host, _ in answers}
    if not seen:
        kind = NatKind.BLOCKED if len(hosts) > 1 else NatKind.UNKNOWN
        return NatFacts(kind, asked=len(answers))
    said = dict.fromkeys((mapped, host) for (host, _), mapped in seen.items())
    witnesses = Counter(mapped for mapped, _ in said)
    ordered = tuple(mapped for mapped, _ in witnesses.most_common())
    kind = _kind(witnesses, ordered, own_hosts)
    if kind is NatKind.EASY:
        ordered = tuple(mapped for mapped in ordered if witnesses[mapped] > 1)
    return NatFacts(
        kind,
        ordered,
        keeps_port=all(port == own_port for _, port in ordered),
        asked=len(answers),
        answered=len(seen),
    )


def _kind(
    witnesses: Counter[Address], ordered: tuple[Address, ...], own_hosts: Collection[str]
) -> NatKind:
    """witnesses: on how many hosts each address was seen."""
    if ordered[0][0] in own_hosts:
        return NatKind.NONE
    if witnesses[ordered[0]] > 1:
        return NatKind.EASY
    return NatKind.HARD if len(ordered) > 1 else NatKind.UNKNOWN


def is_worth_asking(server: str, bound_host: str, own_hosts: Collection[str]) -> bool:
    """Whether a socket bound to `bound_host`, on a machine with the addresses `own_hosts`, can
    reach the address `server` at all."""
    address, bound = ipaddress.ip_address(server), ipaddress.ip_address(bound_host)
    if bound.is_unspecified:
        if bound.version == 4 and address.version == 6:
            return False
        return address.is_loopback or any(_leads_out(own, address.version) for own in own_hosts)
    return bound.version == address.version and bound.is_loopback == address.is_loopback


def _leads_out(own_host: str, version: int) -> bool:
    own = ipaddress.ip_address(own_host)
    return own.version == version and not (own.is_loopback or own.is_link_local)
