"""Reply codes where one side has a TURN server, which is coturn, on loopback."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from discovery.reply import parse_untrusted
from discovery.token import Token
from meshnode.errors import NetworkError
from meshnode.events import Kind
from tests.lab.parties import Party, party
from tests.lab.turn import Coturn, coturn_on_loopback, until_free
from tests.lab.webrtc import LOOPBACK
from tunnels import dial
from tunnels.link import LINK_KINDS
from tunnels.peer import Candidate
from tunnels.turn import IceServers

WITHIN_S = 60.0
ALL = tuple(LINK_KINDS)
NO_UDP = ("tcp", "webrtc")


@pytest.fixture(scope="module")
def coturn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coturn]:
    with coturn_on_loopback(tmp_path_factory.mktemp("coturn")) as server:
        yield server


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the address where nobody is."""
    monkeypatch.setattr(dial, "GIVE_UP_S", 2.0)


@asynccontextmanager
async def inviter_and_joiner(
    folder: Path, turn: IceServers, kinds: tuple[str, ...], inviters: tuple[str, ...] = ALL
) -> AsyncIterator[tuple[Party, Party, Token]]:
    """Bob and Ann, and a token by which she finds nobody. turn, kinds of links: hers."""
    with trio.fail_after(WITHIN_S), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((LOOPBACK, 0))
        nowhere = Candidate("quic", LOOPBACK, silent.getsockname()[1])
        async with (
            party(folder, None, "bob", transports=inviters) as bob,
            party(folder, None, "ann", transports=kinds, ice=turn) as ann,
        ):
            ann.connections.replies.wait_s = 120.0
            yield bob, ann, replace(bob.invite(), candidates=(nowhere,))


async def shown(joiner: Party) -> str:
    """The code, when it is there."""
    while True:
        for event in joiner.events:
            if event.kind is Kind.REPLY:
                return str(event.data["line"]).removeprefix("mesh accept ")
        await trio.sleep(0.02)


@pytest.mark.parametrize("kinds", [NO_UDP, ("webrtc",), ALL])
async def test_who_waits_at_a_turn_server_is_met_there(
    coturn: Coturn, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    """Where nothing else is left, and beside punching: whichever stands first."""
    async with (
        inviter_and_joiner(tmp_path, coturn.over("udp"), kinds) as (bob, ann, token),
        trio.open_nursery() as nursery,
    ):
        joined = trio.Event()

        async def join() -> None:
            await ann.connections.join(token)
            joined.set()

        nursery.start_soon(join)
        code = await shown(ann)
        (place,) = parse_untrusted(code).places
        where = await bob.connections.replies.accept(code)
        if kinds == NO_UDP:
            assert where == f"{LOOPBACK}:{place[1]}, its TURN server"
        await joined.wait()
        assert ann.knows(bob)
        ann.session(bob).end("seen enough")
        await until_free(place)
        nursery.cancel_scope.cancel()


async def test_a_turn_server_that_refuses_leaves_a_code_without_a_place(
    coturn: Coturn, tmp_path: Path
) -> None:
    refused = coturn.over("udp", "battery staple")
    async with (
        inviter_and_joiner(tmp_path, refused, ALL) as (bob, ann, token),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(ann.connections.join, token)
        code = await shown(ann)
        assert parse_untrusted(code).places == ()
        assert "no place at the TURN server" in ann.warnings()
        assert "battery" not in ann.warnings()
        await bob.connections.replies.accept(code)
        nursery.cancel_scope.cancel()


async def test_an_inviter_without_webrtc_says_so(coturn: Coturn, tmp_path: Path) -> None:
    async with (
        inviter_and_joiner(tmp_path, coturn.over("udp"), NO_UDP, ("tcp",)) as (bob, ann, token),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(ann.connections.join, token)
        with pytest.raises(NetworkError, match="makes no WebRTC links") as error:
            await bob.connections.replies.accept(await shown(ann))
        assert "Is it still waiting?" in str(error.value)
        nursery.cancel_scope.cancel()


async def test_a_code_that_nobody_brings_is_given_up_and_its_place_too(
    coturn: Coturn, tmp_path: Path
) -> None:
    async with inviter_and_joiner(tmp_path, coturn.over("udp"), NO_UDP) as (_, ann, token):
        ann.connections.replies.wait_s = 2.0
        with pytest.raises(NetworkError, match="nobody came to this node's TURN server"):
            await ann.connections.join(token)
        (place,) = parse_untrusted(await shown(ann)).places
        await until_free(place)
