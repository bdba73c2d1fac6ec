"""Two nodes that cannot talk yet meet at the TURN server of one: a key and a place are known."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.lab.turn import Coturn, coturn_on_loopback, is_taken, until_free
from tests.lab.webrtc import LOOPBACK, Side, side
from tunnels import webrtc_ice, webrtc_transport
from tunnels.dial import AddressPolicy
from tunnels.errors import LinkClosed
from tunnels.link import CloseCode
from tunnels.turn import IceServers
from tunnels.webrtc import WebRtcLink
from tunnels.webrtc_transport import AT_OUR_TURN_SERVER, Waiting

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
SOMEWHERE = (LOOPBACK, 9)
WITHIN_S = 60.0


@pytest.fixture(scope="module")
def coturn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coturn]:
    with coturn_on_loopback(tmp_path_factory.mktemp("coturn")) as server:
        yield server


@pytest.fixture
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a place where nobody answers."""
    monkeypatch.setattr(webrtc_transport, "COME_S", 1.5)


@asynccontextmanager
async def joiner_and_inviter(
    servers: IceServers,
    policy: AddressPolicy = AddressPolicy(allow_loopback=True),  # noqa: B008
) -> AsyncIterator[tuple[Side, Side]]:
    """The joiner alone has a TURN server. policy: the inviter's."""
    with trio.fail_after(WITHIN_S):
        async with trio.open_nursery() as nursery:
            yield side(nursery, "ann", servers), side(nursery, "bob", policy=policy)
            nursery.cancel_scope.cancel()


async def knock(visitor: Side, waiting: Waiting) -> None:
    with contextlib.suppress(LinkClosed):
        await visitor.transport.come_untrusted([waiting.place], KEY)


async def linked(ann: Side, bob: Side) -> tuple[WebRtcLink, WebRtcLink]:
    async with (
        ann.transport.wait_at_turn(bob.identity.peer, KEY) as waiting,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(waiting.let_in, [SOMEWHERE])
        nursery.start_soon(knock, bob, waiting)
        await waiting.called()
        near = await ann.transport.dial(AT_OUR_TURN_SERVER, bob.identity.peer)
        far = await bob.accepted.receive()
        nursery.cancel_scope.cancel()
    return near, far


@pytest.mark.parametrize("transport", ["udp", "tls"])
async def test_who_holds_the_key_and_knows_the_place_is_linked_with(
    coturn: Coturn, transport: str
) -> None:
    async with (
        joiner_and_inviter(coturn.over(transport)) as (ann, bob),
        ann.transport.wait_at_turn(bob.identity.peer, KEY) as waiting,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(waiting.let_in, [SOMEWHERE])
        nursery.start_soon(bob.transport.come_untrusted, [waiting.place], KEY)
        await waiting.called()
        near = await ann.transport.dial(AT_OUR_TURN_SERVER, bob.identity.peer)
        far = await bob.accepted.receive()
        async with trio.open_nursery() as proving:
            proving.start_soon(bob.prove, far)
            await ann.prove(near, bob)
        assert near.is_relayed
        assert far.remote == f"{LOOPBACK}:{waiting.place[1]}"
        near.close(CloseCode.LINK_OVER, "done")
        await far.closed.wait()
        await until_free(waiting.place)
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("_short_patience")
async def test_another_key_calls_nobody_and_is_told_so(coturn: Coturn) -> None:
    async with (
        joiner_and_inviter(coturn.over("udp")) as (ann, bob),
        ann.transport.wait_at_turn(bob.identity.peer, KEY) as waiting,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(waiting.let_in, [SOMEWHERE])
        with pytest.raises(LinkClosed, match="nobody was met"):
            await bob.transport.come_untrusted([waiting.place], OTHER_KEY)
        with trio.move_on_after(0) as at_once:
            await waiting.called()
        assert at_once.cancelled_caught
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("_short_patience")
async def test_a_host_that_was_not_named_does_not_get_through(coturn: Coturn) -> None:
    """The TURN server keeps it out: without `let_in` nobody may come."""
    async with (
        joiner_and_inviter(coturn.over("udp")) as (ann, bob),
        ann.transport.wait_at_turn(bob.identity.peer, KEY) as waiting,
    ):
        with pytest.raises(LinkClosed, match="nobody was met"):
            await bob.transport.come_untrusted([waiting.place], KEY)


@pytest.mark.parametrize("asked_every_s", [0.5, 60.0])
async def test_whom_to_let_in_a_server_forgets_unless_it_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_every_s: float
) -> None:
    """One that forgets after 2 s, where the standard says 300."""
    monkeypatch.setattr(webrtc_transport, "REFRESH_S", asked_every_s)
    monkeypatch.setattr(webrtc_transport, "COME_S", 3.0)
    forgetful = ("--permission-lifetime=2", "--channel-lifetime=2")
    with coturn_on_loopback(tmp_path, *forgetful) as server:
        async with (
            joiner_and_inviter(server.over("udp")) as (ann, bob),
            ann.transport.wait_at_turn(bob.identity.peer, KEY) as waiting,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(waiting.let_in, [SOMEWHERE])
            await trio.sleep(5)  # coturn goes by the clock on the wall
            nursery.start_soon(knock, bob, waiting)
            with trio.move_on_after(2) as patience:
                await waiting.called()
            assert patience.cancelled_caught is (asked_every_s > 2)
            nursery.cancel_scope.cancel()


async def test_a_link_outlives_what_a_server_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that forgets after 8 s is asked again by then; consent checks go every 5 s or so."""
    monkeypatch.setattr(webrtc_ice, "REBIND_S", 1)
    with coturn_on_loopback(tmp_path, "--permission-lifetime=8", "--channel-lifetime=8") as server:
        async with joiner_and_inviter(server.over("udp")) as (ann, bob):
            near, far = await linked(ann, bob)
            await trio.sleep(12)
            (await far.open_channel()).send(b"still there")
            with trio.fail_after(5):
                assert await (await near.accept_channel()).receive() == b"still there"


async def test_after_the_wait_nothing_is_left_at_the_server(coturn: Coturn) -> None:
    async with joiner_and_inviter(coturn.over("udp")) as (ann, bob):
        async with ann.transport.wait_at_turn(bob.identity.peer, KEY) as waiting:
            link = waiting.meeting.link
            with pytest.raises(LinkClosed, match="already"):
                async with ann.transport.wait_at_turn(bob.identity.peer, KEY):
                    pass
            assert is_taken(waiting.place)
        assert link.closure is not None
        await until_free(waiting.place)
        with pytest.raises(LinkClosed, match="nobody is waited for"):
            await ann.transport.dial(AT_OUR_TURN_SERVER, bob.identity.peer)
        assert link.stack.ice.places() == ()


async def test_a_place_that_the_policy_refuses_gets_not_one_datagram() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as victim:
        victim.bind((LOOPBACK, 0))
        victim.settimeout(0.5)
        async with joiner_and_inviter(IceServers(), AddressPolicy()) as (_, bob):
            with pytest.raises(LinkClosed, match="loopback"):
                await bob.transport.come_untrusted([victim.getsockname()], KEY)
        with pytest.raises(TimeoutError):
            victim.recv(1500)


async def test_one_code_is_followed_once_at_a_time() -> None:
    async with joiner_and_inviter(IceServers()) as (_, bob):
        with trio.move_on_after(0.1):
            await bob.transport.come_untrusted([SOMEWHERE], KEY)
        with pytest.raises(LinkClosed, match="busy"):
            await bob.transport.come_untrusted([SOMEWHERE], KEY)
