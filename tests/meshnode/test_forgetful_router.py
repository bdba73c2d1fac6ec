"""A member behind a router that forgets what it forwards, and says so: its peers wait for it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.lab.nats import Internet, Kind, Router
from tests.lab.nodes import two_nodes
from tests.lab.parties import PORT, Party, echo, party, world_of_parties
from tunnels import Candidate, Session
from tunnels.heartbeat import DEAD_S
from tunnels.link import CloseCode
from tunnels.redial import GONE_AFTER_S

Clock = trio.testing.MockClock
LINKS = ("quic", "tcp")
ROUTER = "11.0.2.1"
WITHOUT_S = 30.0  # until the node asks its router again


def forward(router: Router, bob: Party) -> None:
    router.forwards[PORT] = ("192.168.2.2", PORT)
    bob.endpoint.tell_candidates_changed()


def forwarded(router: Router) -> list[Candidate]:
    """As discovery.portmap tells the endpoint."""
    return [Candidate(kind, ROUTER, port, "mapped") for port in router.forwards for kind in LINKS]


async def answers(session: Session) -> bool:
    stream = await session.open("control")
    await stream.send_all(b"hello")
    return await stream.receive_some() == b"hello"


async def test_a_routers_refusal_ends_no_session(tmp_path: Path, autojump_clock: Clock) -> None:
    """alice, whom nobody can dial, knows bob by what he says of himself alone."""
    async with world_of_parties() as world, AsyncExitStack() as stack:
        internet = Internet(world)
        router = Router(ROUTER, Kind.PORT_RESTRICTED, rejects=True)
        homes = (Router("11.0.1.1", Kind.PORT_RESTRICTED), router)
        alice, bob = [
            await stack.enter_async_context(
                party(
                    tmp_path, internet.host(f"192.168.{n}.2", behind=internet.network(home)), name
                )
            )
            for n, (name, home) in enumerate(zip(("alice", "bob"), homes, strict=True), 1)
        ]
        bob.endpoint.add_candidates(lambda: forwarded(router))
        forward(router, bob)
        for one in (alice, bob):
            one.endpoint.serve("control", echo)
            one.run_connections()
        await trio.testing.wait_all_tasks_blocked()
        await alice.connections.join(bob.invite())
        await trio.sleep(5)
        session = alice.session(bob)
        stream = await session.open("control")
        await stream.send_all(b"before ")

        router.restart()
        for link in session.standing:
            link.close(CloseCode.LINK_OVER, "the router resets what it does not know")
        await trio.sleep(GONE_AFTER_S + 1)
        assert session.suspected
        await trio.sleep(WITHOUT_S)
        assert not session.closed.is_set(), session.close_reason

        forward(router, bob)
        with trio.fail_after(10):
            await session.wait_heard()
        await stream.send_all(b"after")
        got = b""
        while len(got) < len(b"before after"):
            got += await stream.receive_some()
        assert got == b"before after"
        assert alice.session(bob) is session


@pytest.mark.parametrize(
    ("kind", "ends"),
    [("host", True), ("given", False), ("mapped", False), ("reflexive", False), ("newer", False)],
)
async def test_only_a_port_that_is_surely_the_peers_own_says_that_it_has_ended(
    kind: str, ends: bool, autojump_clock: Clock
) -> None:
    async with two_nodes(dead_after_s=DEAD_S) as pair:
        bob = pair.bob.endpoint
        places = [replace(one, kind=kind) for one in bob.candidates()]
        session = await pair.alice.endpoint.connect(bob.peer, places)
        pair.bob.kill()
        pair.world.refusing |= {(one.host, one.port) for one in places}
        await trio.sleep(WITHOUT_S)
        assert session.closed.is_set() == ends
