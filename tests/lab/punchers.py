"""Two machines anywhere in an internet of memory, each with one socket, that punch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio
import trio.testing

from tests.lab.datagrams import FakeHost, FakeSocket, World
from tests.lab.nats import Internet
from tunnels.binding import Address
from tunnels.consent import HEADER_BYTES
from tunnels.demux import Batch, SharedSocket
from tunnels.dial import AddressPolicy
from tunnels.errors import PunchFailed
from tunnels.handshake import Role
from tunnels.meeting import Meeting, Nats
from tunnels.peer import NatKind
from tunnels.punch import Puncher

KEY = b"k" * 32
PORT = 4433
MIRRORS = (("11.255.0.1", 1), ("11.255.0.2", 2))
ANSWER_S = 1.0  # within which a mirror has answered, or never will
PATIENCE_S = 300.0


class Witness:
    """I see what a machine sends to addresses from which nothing has come yet."""

    def __init__(self) -> None:
        self.unasked_bytes: Counter[str] = Counter()  # by host, headers counted
        self._heard: set[Address] = set(MIRRORS)

    def watch(self, socket: FakeSocket) -> FakeSocket:
        send, arrive = socket.send, socket.arrive

        def watched_send(datagrams: Sequence[bytes], to: Address) -> None:
            if to not in self._heard:
                header = HEADER_BYTES[6 if ":" in to[0] else 4]
                self.unasked_bytes[to[0]] += sum(len(one) + header for one in datagrams)
            send(datagrams, to)

        def watched_arrive(datagram: bytes, sender: Address) -> None:
            self._heard.add(sender)
            arrive(datagram, sender)

        socket.send, socket.arrive = watched_send, watched_arrive  # type: ignore[method-assign]
        return socket


@dataclass
class Side:
    """A machine that may punch. reflexive: where mirrors on the internet see its socket."""

    host: FakeHost
    shared: SharedSocket
    puncher: Puncher
    witness: Witness
    reflexive: list[Address] = field(default_factory=list)
    heard: list[tuple[bytes, Address]] = field(default_factory=list)

    @property
    def addresses(self) -> tuple[Address, ...]:
        own = [(one, PORT) for one in self.host.addresses]
        return tuple(dict.fromkeys([*self.reflexive[:1], *own]))

    @property
    def nats(self) -> Nats:
        if len(self.reflexive) < len(MIRRORS):
            return Nats(NatKind.UNKNOWN if self.reflexive else NatKind.BLOCKED)
        if self.reflexive[0][0] in self.host.addresses:
            return Nats(NatKind.NONE)
        return Nats(NatKind.EASY if len(set(self.reflexive)) == 1 else NatKind.HARD)

    def hear(self, batch: Batch) -> None:
        self.heard += batch

    async def look_into_mirrors(self) -> None:
        for mirror in MIRRORS:
            self.shared.send([b"\x40who am I"] * 4, mirror)
        await trio.sleep(ANSWER_S)
        answers = {mirror: data for data, mirror in self.heard if mirror in MIRRORS}
        for mirror in MIRRORS:
            if mirror in answers:
                host, _, port = answers[mirror][1:].decode().rpartition(" ")
                self.reflexive.append((host, int(port)))


@dataclass
class Found:
    """What one side's punch came to."""

    address: Address | None
    why: str
    took_s: float


@asynccontextmanager
async def a_side(host: FakeHost, seed: int = 0) -> AsyncIterator[Side]:
    """While the block lasts."""
    witness = Witness()
    shared = SharedSocket(witness.watch(host.bind(None, PORT)))
    policy = AddressPolicy()
    own = host.interface_addresses()

    def refusal(to: str) -> str | None:
        return policy.refusal(to, bound_host="0.0.0.0", own_addresses=own)

    dice = random.Random(f"{host.addresses} {seed}")

    def bind() -> FakeSocket:
        return witness.watch(host.bind(None, 0))

    side = Side(host, shared, Puncher(shared, bind, refusal, dice.randbytes), witness)
    shared.on_quic = side.hear
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        yield side
        nursery.cancel_scope.cancel()
    shared.close()


@asynccontextmanager
async def an_internet(world: World) -> AsyncIterator[Internet]:
    """A world that runs, with mirrors in it. It ends, so that a test that waits in vain does."""
    internet = Internet(world)
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.run)
            for host, port in MIRRORS:
                nursery.start_soon(_reflect, internet.host(host), port)
            await trio.testing.wait_all_tasks_blocked()
            yield internet
            nursery.cancel_scope.cancel()


async def _reflect(host: FakeHost, port: int) -> None:
    socket = host.bind(None, port)
    while True:
        for _, sender in await socket.receive():
            socket.send([b"\x40" + f"{sender[0]} {sender[1]}".encode()], sender)


async def meet(dialler: Side, listener: Side, key: bytes = KEY, skew_s: float = 0.0) -> list[Found]:
    """Both punch; what came of it for the dialler, and for the listener, who is late by skew_s."""
    found: dict[Role, Found] = {}

    async def punch(us: Side, them: Side, role: Role, begins_in_s: float) -> None:
        meeting = Meeting(
            key, role, them.addresses, mine=us.nats, theirs=them.nats, begins_in_s=begins_in_s
        )
        began_s = trio.current_time()
        address, why = None, ""
        try:
            address = await us.puncher.punch(meeting)
        except PunchFailed as error:
            why = str(error)
        found[role] = Found(address, why, trio.current_time() - began_s)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(punch, dialler, listener, Role.DIALLER, 0.0)
        nursery.start_soon(punch, listener, dialler, Role.LISTENER, skew_s)
    return [found[Role.DIALLER], found[Role.LISTENER]]


async def carries(us: Side, to: Address, them: Side) -> bool:
    """Whether one of a few datagrams gets to the other's socket, and an answer back."""
    them.heard.clear()
    us.heard.clear()
    for _ in range(4):
        us.shared.send([b"\x40there"], to)
    await trio.sleep(ANSWER_S)
    for _, sender in them.heard:
        them.shared.send([b"\x40back"], sender)
    await trio.sleep(ANSWER_S)
    return any(sender == to for _, sender in us.heard)
