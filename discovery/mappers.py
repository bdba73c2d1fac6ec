"""Asking a router for port mappings: PCP, NAT-PMP, UPnP, each behind the same four calls.

Heard is only what comes from the router's own address; all else, and what is no answer, is passed
over. Every wait is bounded here, by the schedules of the RFCs cut short: a router on the same
network answers in milliseconds or not at all.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import trio

from discovery import nat_pmp, pcp, upnp
from discovery.gateway import Gateway
from discovery.mapping import LIFETIME_S, Epoch, Mapping, Transport
from discovery.plain_http import Exchange
from tunnels.binding import Address
from tunnels.errors import BadFrame, LinkClosed, ListenFailed
from tunnels.network import Network
from tunnels.peer import format_address

TRIES_S = (0.25, 0.5, 1.0)  # RFC 6886 section 3.1, which would go on for a minute
SEARCHES_S = (0.5, 1.5)  # a device may take a second to answer (MX 1)
HTTP_TIMEOUT_S = 4.0
MAX_DATAGRAMS = 64  # heard for one question
UPNP_TRIES = 4  # of an outside port that somebody else has
UPNP_NAME = "mesh"

_Answer = TypeVar("_Answer")


class MappingFailed(Exception):
    """The router gives no mapping; the text says why, in words for its owner."""


class Mapper(Protocol):
    """One way of asking one router. Every failure is a MappingFailed."""

    name: str

    async def find(self) -> None:
        """Returns when the router answers to this way of asking."""

    async def map(self, transport: Transport, port: int, wanted: int) -> Mapping:
        """A mapping to our port, under the number `wanted` outside where that is free. Asking again
        is renewing."""

    async def unmap(self, mapping: Mapping) -> None: ...

    async def keeps(self, mappings: Sequence[Mapping]) -> bool:
        """Whether the router still has them and its outside address is still theirs."""


def all_mappers(network: Network, gateway: Gateway) -> tuple[Mapper, ...]:
    kinds: tuple[Callable[[Network, Gateway], Mapper], ...] = (PcpMapper, NatPmpMapper, UpnpMapper)
    return tuple(kind(network, gateway) for kind in kinds)


async def _ask(
    network: Network,
    gateway: Gateway,
    questions: Sequence[tuple[bytes, Address]],
    tries_s: Sequence[float],
    read: Callable[[bytes], _Answer | None],
) -> _Answer:
    """The first answer from the router that `read` takes (None, BadFrame: it is passed over)."""
    try:
        socket = network.bind(gateway.ours, 0)
    except ListenFailed as error:
        raise MappingFailed(str(error)) from error
    try:
        with trio.CancelScope() as refused:

            def hear_refusal(address: Address, _reason: str) -> None:
                if {address} == {to for _, to in questions}:
                    refused.cancel()

            socket.on_unreachable = hear_refusal
            heard = 0
            for try_s in tries_s:
                for question, to in questions:
                    socket.send([question], to)
                with trio.move_on_after(try_s):
                    while heard < MAX_DATAGRAMS:
                        batch = await socket.receive()
                        for datagram, sender in batch[: MAX_DATAGRAMS - heard]:
                            heard += 1
                            answer = _read(read, datagram) if sender[0] == gateway.address else None
                            if answer is not None:
                                return answer
    finally:
        socket.close()
    raise MappingFailed("it does not answer")


def _read(read: Callable[[bytes], _Answer | None], datagram: bytes) -> _Answer | None:
    try:
        return read(datagram)
    except BadFrame:
        return None


class PcpMapper:
    name = "PCP"

    def __init__(self, network: Network, gateway: Gateway) -> None:
        self._network = network
        self._gateway = gateway
        self._nonce = secrets.token_bytes(pcp.NONCE_BYTES)
        self._epoch = Epoch()

    async def find(self) -> None:
        await self.keeps(())

    async def map(self, transport: Transport, port: int, wanted: int) -> Mapping:
        return await self._map(transport, port, wanted, LIFETIME_S)

    async def unmap(self, mapping: Mapping) -> None:
        await self._map(mapping.transport, mapping.internal_port, 0, 0)

    async def keeps(self, mappings: Sequence[Mapping]) -> bool:  # noqa: ARG002
        # Its clock starts anew also when its outside address has changed (RFC 6887 section 8.5).
        answer = await self._announce()
        return not self._epoch.has_restarted(answer.epoch_s, trio.current_time())

    async def _announce(self) -> pcp.Answer:
        def read(data: bytes) -> pcp.Answer | None:
            answer = pcp.parse_answer_untrusted(data)
            return answer if answer.transport is None else None

        return await self._ask(pcp.encode_announce(self._gateway.ours), read)

    async def _map(self, transport: Transport, inside: int, outside: int, life_s: int) -> Mapping:
        def read(data: bytes) -> pcp.Answer | None:
            answer = pcp.parse_answer_untrusted(data)
            ours = (self._nonce, transport, inside)
            matches = (answer.nonce, answer.transport, answer.internal_port) == ours
            return answer if matches else None

        ours = self._gateway.ours
        question = pcp.encode_map(ours, self._nonce, transport, inside, outside, life_s)
        answer = await self._ask(question, read)
        if answer.refusal is not None:
            raise MappingFailed(answer.refusal)
        return Mapping(transport, inside, answer.host, answer.port, answer.lifetime_s)

    async def _ask(self, question: bytes, read: Callable[[bytes], pcp.Answer | None]) -> pcp.Answer:
        to = (self._gateway.address, nat_pmp.PORT)
        return await _ask(self._network, self._gateway, [(question, to)], TRIES_S, read)


class NatPmpMapper:
    name = "NAT-PMP"

    def __init__(self, network: Network, gateway: Gateway) -> None:
        self._network = network
        self._gateway = gateway
        self._epoch = Epoch()

    async def find(self) -> None:
        await self.keeps(())

    async def map(self, transport: Transport, port: int, wanted: int) -> Mapping:
        host = (await self._outside()).address or ""
        answer = await self._map(transport, port, wanted, LIFETIME_S)
        return Mapping(transport, port, host, answer.port, answer.lifetime_s)

    async def unmap(self, mapping: Mapping) -> None:
        await self._map(mapping.transport, mapping.internal_port, 0, 0)

    async def keeps(self, mappings: Sequence[Mapping]) -> bool:
        answer = await self._outside()
        restarted = self._epoch.has_restarted(answer.epoch_s, trio.current_time())
        return not restarted and all(one.host == answer.address for one in mappings)

    async def _outside(self) -> nat_pmp.Answer:
        return await self._ask(nat_pmp.encode_address_question(), None, 0)

    async def _map(
        self, transport: Transport, inside: int, outside: int, life_s: int
    ) -> nat_pmp.Answer:
        question = nat_pmp.encode_map(transport, inside, outside, life_s)
        return await self._ask(question, transport, inside)

    async def _ask(
        self, question: bytes, transport: Transport | None, inside: int
    ) -> nat_pmp.Answer:
        def read(data: bytes) -> nat_pmp.Answer | None:
            answer = nat_pmp.parse_answer_untrusted(data)
            matches = (answer.transport, answer.internal_port) == (transport, inside)
            refused = answer.refusal is not None and answer.transport is transport
            return answer if matches or refused else None

        to = (self._gateway.address, nat_pmp.PORT)
        answer = await _ask(self._network, self._gateway, [(question, to)], TRIES_S, read)
        if answer.refusal is not None:
            raise MappingFailed(answer.refusal)
        return answer


class UpnpMapper:
    name = "UPnP"

    def __init__(self, network: Network, gateway: Gateway) -> None:
        self._network = network
        self._gateway = gateway
        self._control: upnp.Control | None = None

    async def find(self) -> None:
        gateway = self._gateway
        hosts = (gateway.address, upnp.SSDP_GROUP)
        questions = [
            (search, (host, upnp.SSDP_PORT)) for search in upnp.encode_searches() for host in hosts
        ]

        def read(data: bytes) -> upnp.Place:
            return upnp.parse_search_answer_untrusted(data, gateway.address)

        place = await _ask(self._network, gateway, questions, SEARCHES_S, read)
        status, body = await self._fetch(place)
        if status != 200:
            raise MappingFailed(f"its description cannot be read: HTTP {status}")
        try:
            self._control = upnp.parse_description_untrusted(body, place, gateway.address)
        except BadFrame as error:
            raise MappingFailed(f"its description is of no use: {error}") from error

    async def map(self, transport: Transport, port: int, wanted: int) -> Mapping:
        host = await self._outside()
        life_s, outside = LIFETIME_S, wanted
        refusal = ""
        for _ in range(UPNP_TRIES):
            answer = await self._call(
                "AddPortMapping",
                NewRemoteHost="",
                NewExternalPort=outside,
                NewProtocol=transport.name,
                NewInternalPort=port,
                NewInternalClient=self._gateway.ours,
                NewEnabled=1,
                NewPortMappingDescription=UPNP_NAME,
                NewLeaseDuration=life_s,
            )
            if answer.error is None:
                return Mapping(transport, port, host, outside, life_s)
            refusal = f"it refuses: {answer.reason or 'no reason given'} ({answer.error})"
            if answer.error == upnp.PERMANENT_ONLY and life_s:
                life_s = 0
            elif answer.error == upnp.CONFLICT:
                outside = 49152 + secrets.randbelow(16384)
            else:
                break
        raise MappingFailed(refusal)

    async def unmap(self, mapping: Mapping) -> None:
        await self._call(
            "DeletePortMapping",
            NewRemoteHost="",
            NewExternalPort=mapping.port,
            NewProtocol=mapping.transport.name,
        )

    async def keeps(self, mappings: Sequence[Mapping]) -> bool:
        host = await self._outside()
        for one in mappings:
            found = await self._call(
                "GetSpecificPortMappingEntry",
                NewRemoteHost="",
                NewExternalPort=one.port,
                NewProtocol=one.transport.name,
            )
            client = found.values.get("NewInternalClient")
            if one.host != host or found.error is not None or client != self._gateway.ours:
                return False
        return True

    async def _outside(self) -> str:
        answer = await self._call("GetExternalIPAddress")
        if answer.error is not None:
            raise MappingFailed(f"it does not tell its outside address: {answer.reason}")
        try:
            return upnp.parse_external_address_untrusted(answer)
        except BadFrame as error:
            raise MappingFailed(f"it tells {error}") from error

    async def _call(self, action: str, **arguments: object) -> upnp.SoapAnswer:
        control = self._control
        assert control is not None, "find comes first"
        _, body = await self._fetch(
            control.place,
            upnp.soap_action(control.service, action),
            upnp.encode_soap(control.service, action, arguments),
        )
        try:
            return upnp.parse_soap_untrusted(body, action)
        except BadFrame as error:
            raise MappingFailed(f"it talks nonsense: {error}") from error

    async def _fetch(
        self, place: upnp.Place, soap_action: str = "", body: bytes = b""
    ) -> tuple[int, bytes]:
        """Status and body of one HTTP exchange with the router."""
        to = (self._gateway.address, place.port)
        exchange = Exchange()
        question = exchange.question(
            format_address(*to), place.path, soap_action=soap_action, body=body
        )
        try:
            with trio.fail_after(HTTP_TIMEOUT_S):
                await _exchange(self._network, to, question, exchange)
        except trio.TooSlowError as error:
            raise MappingFailed("its web server does not answer") from error
        except (OSError, LinkClosed, BadFrame) as error:
            raise MappingFailed(f"its web server cannot be asked: {error}") from error
        return exchange.status or 0, exchange.body


async def _exchange(network: Network, to: Address, question: bytes, exchange: Exchange) -> None:
    """Raises OSError, LinkClosed, BadFrame."""
    socket = await network.connect(to)
    try:
        unsent = memoryview(question)
        while unsent:
            unsent = unsent[socket.send(unsent) :]
            if unsent:
                await socket.wait_writable()
        while not exchange.done:
            data = await socket.receive()
            exchange.feed_untrusted(data)
            if not data and not exchange.done:
                raise BadFrame("the answer breaks off")
    finally:
        socket.close()
