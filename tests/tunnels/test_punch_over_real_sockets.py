"""Punching with sockets of this machine, on loopback."""

from __future__ import annotations

import trio

from tunnels.binding import Address
from tunnels.demux import Batch, SharedSocket
from tunnels.handshake import Role
from tunnels.meeting import Meeting, Nats
from tunnels.peer import NatKind
from tunnels.punch import Puncher
from tunnels.udp import DatagramSocket, bind

KEY = b"k" * 32


async def test_two_find_each_other() -> None:
    async with trio.open_nursery() as nursery:
        sides = [SharedSocket(bind("127.0.0.1", 0)) for _ in range(2)]
        punchers = [
            Puncher(shared, lambda: bind("127.0.0.1", 0), lambda host: None) for shared in sides
        ]
        for shared in sides:
            nursery.start_soon(shared.run)
        found: dict[Role, Address] = {}

        async def punch(number: int, role: Role) -> None:
            meeting = Meeting(KEY, role, (sides[1 - number].local,))
            found[role] = await punchers[number].punch(meeting)

        with trio.fail_after(30):
            async with trio.open_nursery() as both:
                both.start_soon(punch, 0, Role.DIALLER)
                both.start_soon(punch, 1, Role.LISTENER)
        assert found == {Role.DIALLER: sides[1].local, Role.LISTENER: sides[0].local}
        nursery.cancel_scope.cancel()
    for shared in sides:
        shared.close()


async def test_the_socket_of_a_fan_that_got_through_is_adopted() -> None:
    """Here the other side hears the fan alone, as if its NAT let in nothing else."""
    async with trio.open_nursery() as nursery:
        hard, easy = (SharedSocket(bind("127.0.0.1", 0)) for _ in range(2))
        own, bound = hard.local, list[DatagramSocket]()

        def one_more() -> DatagramSocket:
            bound.append(bind("127.0.0.1", 0))
            return bound[-1]

        puncher = Puncher(hard, one_more, lambda host: None)
        other = Puncher(easy, one_more, lambda host: None)
        hear = easy.on_probe

        def hear_all_but_one(datagram: bytes, sender: Address) -> None:
            if sender != own:
                hear(datagram, sender)

        easy.on_probe = hear_all_but_one
        nursery.start_soon(hard.run)
        nursery.start_soon(easy.run)
        meeting = Meeting(KEY, Role.DIALLER, (easy.local,), mine=Nats(NatKind.HARD))
        with trio.fail_after(30):
            async with trio.open_nursery() as both:
                both.start_soon(other.punch, Meeting(KEY, Role.LISTENER, ()))
                assert await puncher.punch(meeting) == easy.local
        heard = trio.Event()
        senders: list[Address] = []

        def hear_quic(batch: Batch) -> None:
            senders.extend(sender for _, sender in batch)
            heard.set()

        easy.on_quic = hear_quic
        hard.send([b"\x40hello"], easy.local)
        with trio.fail_after(30):
            await heard.wait()
        assert senders[0] != own
        assert senders[0] in {socket.local for socket in bound if not socket._closed}  # type: ignore[attr-defined]
        nursery.cancel_scope.cancel()
    for shared in (hard, easy):
        shared.close()
