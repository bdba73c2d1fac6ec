"""How a web server is reached: which addresses may be, and a connection to one of those.

A name is looked up here, each address it has is held against the policy, and the connection goes to
an address that passed, never to the name again: between two lookups a name may come to mean
another machine (DNS rebinding). TLS is checked against the name all the same.

What the user named is the user's word, also where it is this machine itself; where a server sends
us on to is a stranger's. So there are two rules.

A proxy of the environment (`HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY`) is used as other
programs use it: then the proxy looks names up. What of them can be looked up here is held against
the rules too; what cannot is the proxy's to allow. It may also find another meaning than we did: so
nothing that a stranger names goes through it, but for hubs, whose hosts strangers do not choose.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import ssl
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import httpx
import trio

from meshnode.errors import UsageError
from meshnode.models.pull.exchange import Exchange
from meshnode.models.pull.source import SourceError, SourceFault
from meshnode.models.pull.threads import in_thread
from meshnode.models.pull.url import Origin, Url, parse_url

Refusal = Callable[[str], str | None]
"""Why an IP address may not be contacted; None: it may. `AddressPolicy.at` of tunnels makes one."""

CONNECT_WITHIN_S = 20.0
NEXT_ADDRESS_AFTER_S = 0.25
STALL_S = 30.0
OWN_NAMES = ("localhost", "localhost.")


def welcome(_address: str) -> str | None:
    """The rule that lets every address pass."""
    return None


@dataclass(frozen=True)
class Reach:
    """Where connections may go. `named` is the rule for the address that was asked for,
    `redirected` for all that it leads to, `stall_s` how long a server may say nothing.
    `through_proxy`: whether it may be the environment's proxy that looks names up; `looks_up`:
    whether anybody may, but for this machine's own name."""

    named: Refusal
    redirected: Refusal
    stall_s: float = STALL_S
    trusted: ssl.SSLContext | None = None
    through_proxy: bool = True
    looks_up: bool = True

    async def connect(self, url: Url, *, is_named: bool) -> Exchange:
        """A connection, with TLS where the address says so. Raises `SourceError` where it may not
        be or is somebody else's, `SourceFault` where nobody answers."""
        origin = url.origin
        proxy = proxy_for(origin)
        if proxy is not None and not self.through_proxy:
            raise SourceError(
                f"{origin.authority} is reached through a proxy, which looks names up itself, so "
                "that nobody can tell here where that leads: it is not asked at another node's "
                "word; run `mesh pull` on that machine, or add the host to NO_PROXY there"
            )
        refusal = self.named if is_named else self.redirected
        self._check_name(origin)
        addresses = await _addresses(origin, refusal, may_be_unknown=proxy is not None)
        if proxy is not None:
            self._check_name(proxy.origin)
            addresses = await _addresses(proxy.origin, welcome)
        connected = await _first_of(addresses, (proxy or url).origin)
        exchange = Exchange(connected, self.stall_s)
        try:
            await in_thread(exchange, lambda: self._prepare(exchange, origin, proxy))
        except BaseException:
            exchange.close()
            raise
        return exchange

    def _check_name(self, origin: Origin) -> None:
        if not self.looks_up and not _is_literal(origin.host) and origin.host not in OWN_NAMES:
            raise SourceError(
                f"{origin.authority} is not asked: offline (--offline, MESH_OFFLINE) no name is "
                "looked up; give a machine nearby by its address, or allow it with --no-offline"
            )

    def _prepare(self, exchange: Exchange, origin: Origin, proxy: Url | None) -> None:
        if origin.scheme == "https":
            if proxy is not None:
                exchange.tunnel(origin, proxy.authorization)
            exchange.secure(self.trusted or system_trust(), origin.host)
        elif proxy is not None:
            exchange.forward(proxy.authorization)


def proxy_for(origin: Origin) -> Url | None:
    """The environment's proxy for this origin. Raises `SourceError` where it cannot be used."""
    proxies = urllib.request.getproxies()
    named = proxies.get(origin.scheme) or proxies.get("all")
    if not named or urllib.request.proxy_bypass(f"{origin.host}:{origin.port}"):
        return None
    proxy = None
    with contextlib.suppress(UsageError):
        proxy = parse_url(named if "://" in named else f"http://{named}")
    if proxy is None or proxy.origin.scheme != "http":
        raise SourceError(
            f"the proxy that the environment names for {origin.scheme} is none that mesh can use: "
            "name one with http://, or add the host to NO_PROXY"
        )
    return proxy


@cache
def system_trust() -> ssl.SSLContext:
    """Whom the system trusts, and whom the package `certifi` does; SSL_CERT_FILE decides alone."""
    context = httpx.create_ssl_context()
    context.load_default_certs()
    context.set_alpn_protocols(["http/1.1"])
    return context


async def _addresses(
    origin: Origin, refusal: Refusal, *, may_be_unknown: bool = False
) -> list[tuple[str, int]]:
    """The addresses of a host that may be contacted; never none, unless it may be unknown."""
    try:
        found = await trio.socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except OSError as error:
        if may_be_unknown and not _is_literal(origin.host):
            return []
        raise SourceFault(
            f"the name {origin.host} is not found ({error.strerror}): check it, and the network"
        ) from error
    hosts = list(dict.fromkeys(str(address[0]) for *_, address in found))
    reasons = {host: refusal(host.partition("%")[0]) for host in hosts}
    allowed = [(host, origin.port) for host in hosts if reasons[host] is None]
    if not allowed:
        reason = next(iter(reasons.values()), None) or "not tried: it has no address"
        raise SourceError(f"{origin.authority} at {', '.join(hosts)}: {reason}")
    return allowed


async def _first_of(addresses: Sequence[tuple[str, int]], origin: Origin) -> socket.socket:
    """A connection to whichever answers first; each has a little time before the next is tried."""
    winners: list[trio.socket.SocketType] = []
    reasons: list[str] = []

    async def attempt(number: int, address: tuple[str, int], nursery: trio.Nursery) -> None:
        await trio.sleep(number * NEXT_ADDRESS_AFTER_S)
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        connecting = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            await connecting.connect(address)
        except OSError as error:
            connecting.close()
            reasons.append(os.strerror(error.errno) if error.errno else str(error))
        except BaseException:
            connecting.close()
            raise
        else:
            winners.append(connecting)
            nursery.cancel_scope.cancel()

    with trio.move_on_after(CONNECT_WITHIN_S):
        async with trio.open_nursery() as nursery:
            for number, address in enumerate(addresses):
                nursery.start_soon(attempt, number, address, nursery)
    for late in winners[1:]:
        late.close()
    if not winners:
        why = reasons[0] if reasons else f"no answer in {CONNECT_WITHIN_S:g} s"
        raise SourceFault(f"{origin.authority} cannot be reached: {why}")
    return socket.socket(fileno=winners[0].detach())


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
