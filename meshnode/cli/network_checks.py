"""What `mesh doctor` says of the network: how this machine looks from outside, what would help."""

from __future__ import annotations

import contextlib
import ipaddress
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from discovery.portmap import PortMapStatus, describe, survey
from discovery.roster import BadRosterState, Roster
from meshnode.cli.checks import Check, Verdict
from tunnels import AddressPolicy, LinkClosed
from tunnels.binding import Address
from tunnels.demux import SharedSocket
from tunnels.nat import NatFacts
from tunnels.network import HostNetwork, reachable_hosts
from tunnels.outside import OutsideView
from tunnels.peer import NatKind, format_address
from tunnels.stun import Server
from tunnels.stun_port import StunPort

LOOK_S = 12.0
CONNECT_S = 3.0
_MEMBERS = "membership.json"


@dataclass(frozen=True)
class Sight:
    """What a look at the network found. facts: by IP version. named: servers to ask. answers: by
    server, what it saw. relays: which of those that members name could be reached, and how. own:
    our addresses that lead out of this machine."""

    facts: Mapping[int, NatFacts]
    named: Collection[Server]
    answers: Mapping[Address, Address | None]
    unresolved: Sequence[Server]
    portmap: PortMapStatus | None
    relays: Mapping[Address, Sequence[str]]
    own: Sequence[str]


async def look(servers: Collection[Server], relays: Collection[Address], *, portmap: bool) -> Sight:
    """Asks them all at once, from a socket of its own. Raises ListenFailed."""
    network = HostNetwork()
    view = OutsideView(network, servers, peers=lambda: relays)
    by_udp: set[Address] = set()
    by_tcp: set[Address] = set()
    found: list[PortMapStatus] = []

    async def ask_router() -> None:
        found.append(await survey(network))

    async def ask(relay: Address) -> None:
        if await port.ask(relay):
            by_udp.add(relay)

    async def connect(relay: Address) -> None:
        with contextlib.suppress(LinkClosed), trio.move_on_after(CONNECT_S):
            (await network.connect(relay)).close()
            by_tcp.add(relay)

    async with trio.open_nursery() as watching:
        socket = SharedSocket(network.bind(None, 0))
        port = StunPort(socket)
        watching.start_soon(socket.run)
        watching.start_soon(port.run)
        watching.start_soon(view.run, port)
        with trio.move_on_after(LOOK_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(view.checked.wait)
                if portmap:
                    nursery.start_soon(ask_router)
                for relay in relays:
                    nursery.start_soon(ask, relay)
                    nursery.start_soon(connect, relay)
        watching.cancel_scope.cancel()
        socket.close()
    reached = {
        relay: [
            *(["UDP"] if relay in by_udp else []),
            *(["TCP"] if relay in by_tcp else []),
        ]
        for relay in relays
    }
    facts = {version: view.facts(version) for version in (4, 6)}
    portmapped = found[0] if found else None
    own = reachable_hosts("::", network.interface_addresses())
    return Sight(facts, servers, view.answers, view.unresolved, portmapped, reached, own)


def relays_known(home: Path) -> list[Address]:
    """Addresses of relays that members can be reached by, those alone that may be dialled."""
    try:
        state = json.loads((home / _MEMBERS).read_bytes())["roster"]
        members = Roster.from_state_untrusted(state).members()
    except (OSError, ValueError, RecursionError, KeyError, TypeError, BadRosterState):
        return []
    own, policy = HostNetwork().interface_addresses(), AddressPolicy()
    named = {(one.host, one.port) for member in members for one in member.candidates if one.via}
    return sorted(
        (host, port)
        for host, port in named
        if policy.refusal(host, bound_host="::", own_addresses=own) is None
    )


def network_checks(sight: Sight) -> Iterator[Check]:
    for version in (4, 6):
        own = [host for host in sight.own if ipaddress.ip_address(host).version == version]
        yield nat_check(f"IPv{version}", sight.facts[version], own)
    yield _udp(sight)
    yield _stun(sight)
    if sight.portmap is not None:
        yield _port_mapping(sight.portmap, sight.facts[4])
    yield from _relays(sight.relays)


def nat_check(name: str, facts: NatFacts, own: Sequence[str]) -> Check:
    """own: our addresses of that IP version."""
    at = format_address(*facts.mapped[0]) if facts.mapped else ""
    match facts.kind:
        case NatKind.NONE:
            return Check(name, Verdict.OK, f"no NAT: seen from outside as {at}")
        case NatKind.EASY:
            port = "keeps the port" if facts.keeps_port else "changes the port"
            text = f"a NAT that shows everybody the same address, {at}, and {port}: peers are met"
            return Check(name, Verdict.OK, f"{text} directly by hole punching")
        case NatKind.HARD:
            text = (
                f"a NAT that shows everybody another address (hard, or symmetric; one is {at}): "
                "two such nodes cannot meet directly. What helps: port mapping in the router "
                "(UPnP, PCP), IPv6 on both sides, or a relay"
            )
            return Check(name, Verdict.NOTE, text)
        case NatKind.BLOCKED:
            return Check(name, Verdict.NOTE, "nothing comes back from outside (see UDP)")
    if facts.mapped:
        text = f"seen from outside at {at}, by one server: of the NAT's kind two would tell"
        return Check(name, Verdict.NOTE, f"{text}; name another with --stun")
    if facts.asked:
        return Check(name, Verdict.NOTE, "not known: the one server that was asked is silent")
    if own:
        text = f"not asked how it looks from outside (see STUN servers); here it is {own[0]}"
        return Check(name, Verdict.NOTE, text)
    if name == "IPv6":
        return Check(name, Verdict.OK, "none here; where both sides have it, no NAT is in the way")
    return Check(name, Verdict.NOTE, "none here: this machine is in no IPv4 network")


def _udp(sight: Sight) -> Check:
    asked = sum(facts.asked for facts in sight.facts.values())
    answered = sum(facts.answered for facts in sight.facts.values())
    if answered:
        return Check("UDP", Verdict.OK, "goes out, and answers come back")
    if not asked:
        return Check("UDP", Verdict.NOTE, "not tried: nobody was asked (see STUN servers)")
    text = (
        f"of {asked} servers not one answered: this network blocks UDP, or is cut off. Peers are "
        "reached over TCP where that goes directly; elsewhere a relay on port 443 carries it all"
    )
    return Check("UDP", Verdict.NOTE, text)


def _stun(sight: Sight) -> Check:
    name = "STUN servers"
    servers = {one: seen for one, seen in sight.answers.items() if one not in sight.relays}
    silent = [format_address(*one) for one, seen in servers.items() if seen is None]
    unknown = ", ".join(map(str, sight.unresolved))
    if not servers:
        return _nobody_asked(name, sight.named, unknown)
    parts = [f"{len(servers) - len(silent)} of {len(servers)} addresses answered"]
    parts += [f"silent: {', '.join(silent)}"] if silent else []
    parts += [f"not known by name: {unknown} (is there a name server?)"] if unknown else []
    if len(servers) - len(silent) >= 2:
        return Check(name, Verdict.OK, "; ".join(parts))
    parts.append("two that answer are needed: name others with --stun HOST:PORT,HOST:PORT")
    return Check(name, Verdict.NOTE, "; ".join(parts))


def _nobody_asked(name: str, named: Collection[Server], unknown: str) -> Check:
    """Of the way out, nothing was seen then: that is bad, unless it is as the user wished."""
    if not named:
        return Check(name, Verdict.NOTE, "not asked: none is named, so members tell each other")
    if unknown:
        why = f"none is known by name ({unknown}): is this machine connected, with a name server"
        remedy = "Otherwise name some by address with --stun, or stay within with --offline"
    else:
        why = "no network of this machine leads to them: is it connected"
        remedy = "Otherwise stay within with --offline"
    return Check(name, Verdict.BAD, f"not asked: {why}? {remedy}")


def _port_mapping(status: PortMapStatus, facts: NatFacts) -> Check:
    name = "port mapping"
    if status.mappings:
        return Check(name, Verdict.OK, describe(status))
    if status.by is not None:
        text = f"the router at {status.router} forwards ports for those who ask ({status.by})"
        return Check(name, Verdict.OK, text)
    text = status.problem or "not known"  # and what would help
    if facts.kind is NatKind.NONE:
        return Check(name, Verdict.OK, f"{text}; none is needed without a NAT")
    return Check(name, Verdict.NOTE, f"{text} (docs/port-mapping.md)")


def _relays(relays: Mapping[Address, Sequence[str]]) -> Iterator[Check]:
    if not relays:
        text = (
            "no member names one; where two nodes cannot meet, run `mesh relay` on a host outside"
        )
        yield Check("relay", Verdict.OK, text)
    for relay, ways in relays.items():
        where = format_address(*relay)
        if ways:
            yield Check("relay", Verdict.OK, f"{where} is reached over {' and '.join(ways)}")
        else:
            text = f"{where} does not answer: is it up, and its port open for UDP and TCP?"
            yield Check("relay", Verdict.NOTE, text)
