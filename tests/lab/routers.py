"""Home routers in memory: they map ports by PCP, NAT-PMP and UPnP, restart, refuse, and lie."""

from __future__ import annotations

import ipaddress
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from discovery.gateway import Gateway
from tests.discovery.routers import (
    GATEWAY,
    OURS,
    OUTSIDE,
    description,
    http_answer,
    soap_answer,
    soap_fault,
    ssdp_answer,
)
from tests.lab.datagrams import World
from tunnels.binding import Address
from tunnels.tcp_socket import ByteSocket

EVERYTHING = ("PCP", "NAT-PMP", "UPnP")
MAP_PORT, SSDP_PORT, WEB_PORT = 5351, 1900, 5000
_PROTOCOLS = {17: "UDP", 6: "TCP"}
_ARGUMENT = re.compile(r"<(New\w+)>([^<]*)</")


@dataclass(frozen=True)
class Entry:
    """What a port outside leads to, and until when; math.inf for one without an end."""

    client: str
    port: int
    until_s: float


@dataclass
class Router:
    """One router. grants_s: the longest lease. taken: outside ports of somebody else. refuses: with
    the code of the protocol. permanent_only: knows no leases, as old ones."""

    world: World
    speaks: tuple[str, ...] = EVERYTHING
    address: str = GATEWAY
    outside: str = OUTSIDE
    grants_s: int = 7200
    taken: set[int] = field(default_factory=set)
    refuses: dict[str, int] = field(default_factory=dict)
    permanent_only: bool = False
    booted_s: float = -1000.0
    entries: dict[tuple[str, int], Entry] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # how each mapping was asked for
    web: Callable[[bytes], bytes] | None = None  # in place of its own web server

    def gateway(self) -> Gateway:
        return Gateway(self.address, OURS)

    def restart(self) -> None:
        self.entries.clear()
        self.booted_s = trio.current_time()

    @property
    def open(self) -> dict[tuple[str, int], tuple[str, int]]:
        """Ports outside whose lease runs, and where they lead."""
        now = trio.current_time()
        return {
            outside: (entry.client, entry.port)
            for outside, entry in self.entries.items()
            if entry.until_s > now
        }

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            if {"PCP", "NAT-PMP"} & set(self.speaks):
                nursery.start_soon(self._serve, MAP_PORT, self._answer_mapping)
            if "UPnP" in self.speaks:
                nursery.start_soon(self._serve, SSDP_PORT, self._answer_search)
                nursery.start_soon(self._serve_web)

    async def _serve(self, port: int, answer: Callable[[bytes, Address], bytes | None]) -> None:
        socket = self.world.bind((self.address, port))
        try:
            while True:
                for question, sender in await socket.receive():
                    if (said := answer(question, sender)) is not None:
                        socket.send([said], sender)
        finally:
            socket.close()

    # --- PCP and NAT-PMP ----------------------------------------------------------------

    @property
    def epoch_s(self) -> int:
        return int(trio.current_time() - self.booted_s)

    def _answer_mapping(self, question: bytes, sender: Address) -> bytes | None:
        version, opcode = question[0], question[1]
        if version == 2 and "PCP" in self.speaks:
            return self._answer_pcp(question, sender)
        if version == 2:  # as a NAT-PMP server says that it knows no PCP
            return struct.pack(">BBHI", 0, opcode | 128, 1, self.epoch_s)
        return self._answer_nat_pmp(question, sender) if "NAT-PMP" in self.speaks else None

    def _answer_pcp(self, question: bytes, sender: Address) -> bytes:
        opcode, lifetime_s = question[1], int.from_bytes(question[4:8], "big")
        head = (2, opcode | 128, 0)
        if opcode == 0:
            return struct.pack(">BBBBII12x", *head, 0, 0, self.epoch_s)
        assert str(ipaddress.IPv6Address(question[8:24]).ipv4_mapped) == sender[0]
        nonce, protocol, inside, wanted = struct.unpack(">12sB3xHH", question[24:44])
        refusal = self.refuses.get("PCP", 0)
        port, granted_s = wanted, 0
        if not refusal:
            port, granted_s = self._map("PCP", protocol, sender[0], inside, wanted, lifetime_s)
        outside = ipaddress.IPv6Address(f"::ffff:{self.outside}").packed
        answer = struct.pack(">BBBBII12x", *head, refusal, granted_s, self.epoch_s)
        return answer + struct.pack(">12sB3xHH16s", nonce, protocol, inside, port, outside)

    def _answer_nat_pmp(self, question: bytes, sender: Address) -> bytes:
        opcode, refusal = question[1], self.refuses.get("NAT-PMP", 0)
        head = struct.pack(">BBHI", 0, opcode | 128, refusal, self.epoch_s)
        if refusal:
            return head
        if opcode == 0:
            return head + ipaddress.IPv4Address(self.outside).packed
        inside, wanted, lifetime_s = struct.unpack(">HHI", question[4:12])
        protocol = 17 if opcode == 1 else 6
        port, granted_s = self._map("NAT-PMP", protocol, sender[0], inside, wanted, lifetime_s)
        return head + struct.pack(">HHI", inside, port, granted_s)

    def _map(
        self, how: str, protocol: int, client: str, inside: int, wanted: int, lifetime_s: int
    ) -> tuple[int, int]:
        """The outside port and the seconds granted."""
        name = _PROTOCOLS[protocol]
        for outside, entry in list(self.entries.items()):
            if outside[0] == name and (entry.client, entry.port) == (client, inside):
                wanted = outside[1]  # there already: renewed, or taken away
                if not lifetime_s:
                    del self.entries[outside]
        if not lifetime_s:
            return 0, 0
        while wanted in self.taken:
            wanted += 1
        granted_s = min(lifetime_s, self.grants_s)
        self.entries[name, wanted] = Entry(client, inside, trio.current_time() + granted_s)
        self.asked.append(how)
        return wanted, granted_s

    # --- UPnP ---------------------------------------------------------------------------

    def _answer_search(self, question: bytes, _sender: Address) -> bytes | None:
        if not question.startswith(b"M-SEARCH"):
            return None
        return ssdp_answer(f"http://{self.address}:{WEB_PORT}/desc.xml")

    async def _serve_web(self) -> None:
        listener = self.world.host(self.address).listen(self.address, WEB_PORT)
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    nursery.start_soon(self._answer_web, await listener.accept())
        finally:
            listener.close()

    async def _answer_web(self, socket: ByteSocket) -> None:
        question = b""
        while b"\r\n\r\n" not in question or (b"POST" in question and b"Envelope>" not in question):
            data = await socket.receive()
            if not data:
                return
            question += data
        said = (self.web or self._web_page)(question)
        while said:
            said = said[socket.send(said) :]
            await socket.wait_writable()
        socket.finish()

    def _web_page(self, question: bytes) -> bytes:
        if question.startswith(b"GET /desc.xml "):
            return http_answer(description())
        found = re.search(rb'SOAPAction: "[^"#]+#(\w+)"', question)
        assert found is not None
        return self._soap(found[1].decode(), dict(_ARGUMENT.findall(question.decode())))

    def _soap(self, action: str, said: dict[str, str]) -> bytes:
        if action == "GetExternalIPAddress":
            return http_answer(soap_answer(action, NewExternalIPAddress=self.outside))
        outside = said["NewProtocol"], int(said["NewExternalPort"])
        if action == "AddPortMapping":
            return self._add(outside, said)
        if outside not in self.open:
            return http_answer(soap_fault(714, "NoSuchEntryInArray"), "500 Error")
        if action == "DeletePortMapping":
            del self.entries[outside]
            return http_answer(soap_answer(action))
        assert action == "GetSpecificPortMappingEntry"
        client, port = self.open[outside]
        return http_answer(soap_answer(action, NewInternalPort=port, NewInternalClient=client))

    def _add(self, outside: tuple[str, int], said: dict[str, str]) -> bytes:
        refusal = self.refuses.get("UPnP", 0)
        lease_s = int(said["NewLeaseDuration"])
        if self.permanent_only and lease_s:
            refusal = 725
        if outside[1] in self.taken:
            refusal = 718
        if refusal:
            return http_answer(soap_fault(refusal, "Refused"), "500 Error")
        until_s = trio.current_time() + lease_s if lease_s else float("inf")
        client, port = said["NewInternalClient"], int(said["NewInternalPort"])
        self.entries[outside] = Entry(client, port, until_s)
        self.asked.append("UPnP")
        return http_answer(soap_answer("AddPortMapping"))
