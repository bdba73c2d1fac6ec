"""Who may join a tcp link: the connections that the two peers asked for, and no others."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.lab.nodes import Pair, two_nodes
from tests.lab.tcp import LATE_S, connection_to, is_turned_away, link_of, transport_of
from tests.tunnels.conftest import over_tcp
from tests.tunnels.test_identity_attacks import raw_link
from tunnels import Session
from tunnels.frames import Open
from tunnels.frames import encode as encode_record
from tunnels.tcp import MAX_CHANNELS, TcpLink
from tunnels.tcp_connection import Connection
from tunnels.tcp_wire import Begin, Dial, Join, Message, Secret, channel_proof, encode

pytestmark = [pytest.mark.usefixtures("link_kind"), over_tcp]


async def join_with(
    pair: Pair, session: Session, *, number: int = 1000, spoil: str = ""
) -> tuple[Connection, Join]:
    """A JOIN to the link of `session` from a connection of our own."""
    link = link_of(session)
    connection = await connection_to(pair)
    secret = bytes(32) if spoil == "secret" else link._secret
    own = bytes(48) if spoil == "fingerprint" else connection.tls.fingerprint
    certificate = bytes(32) if spoil == "certificate" else link.binding
    proof = channel_proof(secret, link.id, number, certificate, own)
    join = Join(bytes(16) if spoil == "link" else link.id, number, proof)
    connection.send(encode(join))
    return connection, join


async def test_the_tools_of_these_tests_join_when_nothing_is_forged(clock: object) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        connection, _ = await join_with(pair, session)
        connection.send(encode_record(Open(5, 99, "nothing")))
        assert b"not offered" in await connection.receive()


@pytest.mark.parametrize("spoil", ["secret", "fingerprint", "certificate", "link"])
async def test_a_connection_without_the_proof_is_turned_away(spoil: str, clock: object) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        connection, _ = await join_with(pair, session, spoil=spoil)
        assert await is_turned_away(connection)
        assert not session.closed.is_set()
        [bobs] = pair.bob.endpoint.sessions()
        assert not link_of(bobs)._channels


async def test_a_stolen_proof_is_of_no_use_on_another_connection(clock: object) -> None:
    """Before its owner has used it: the connection itself is part of what is proven."""
    async with two_nodes() as pair:
        session = await pair.connect()
        link = link_of(session)
        owner = await connection_to(pair)
        proof = channel_proof(link._secret, link.id, 1000, link.binding, owner.tls.fingerprint)
        stolen = encode(Join(link.id, 1000, proof))
        thief = await connection_to(pair)
        thief.send(stolen)
        assert await is_turned_away(thief)
        owner.send(stolen + encode_record(Open(5, 99, "nothing")))
        assert b"not offered" in await owner.receive()


async def test_a_number_is_not_taken_twice(clock: object) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        await join_with(pair, session)
        again, _ = await join_with(pair, session)
        assert await is_turned_away(again)
        unwanted, _ = await join_with(pair, session, number=1001)
        assert await is_turned_away(unwanted), "an odd number is the listener's to ask for"


async def test_nobody_joins_a_link_that_is_closed(clock: object) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        link = link_of(session)
        await session.aclose("enough")
        await trio.sleep(LATE_S)
        assert not transport_of(pair.bob.endpoint)._links
        connection = await connection_to(pair)
        own = connection.tls.fingerprint
        proof = channel_proof(link._secret, link.id, 8, link.binding, own)
        connection.send(encode(Join(link.id, 8, proof)))
        assert await is_turned_away(connection)


async def test_nobody_joins_before_the_peer_has_proven_its_key(clock: object) -> None:
    """The link has no id and no secret yet that anybody could name, not even an empty one."""
    async with two_nodes() as pair:
        link = await raw_link(pair)
        assert isinstance(link, TcpLink)
        connection = await connection_to(pair)
        own = connection.tls.fingerprint
        for name in (b"", bytes(16)):
            proof = channel_proof(b"", name, 0, link.binding, own)
            connection.send(encode(Join(name.ljust(16, b"\0"), 0, proof)))
        assert await is_turned_away(connection)


async def test_a_link_carries_so_many_channels_and_no_more(clock: object) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        link = link_of(session)
        [bobs] = pair.bob.endpoint.sessions()
        link_of(bobs)._channels = {object() for _ in range(MAX_CHANNELS)}  # type: ignore[misc]
        connection, _ = await join_with(pair, session)
        assert await is_turned_away(connection)
        link_of(bobs)._channels = set()
        assert not link.closed.is_set()


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(Begin(), id="a second BEGIN"),
        pytest.param(Join(bytes(16), 0, bytes(32)), id="a JOIN"),
        pytest.param(Secret(bytes(16), bytes(32)), id="a SECRET from the dialler"),
        pytest.param(Dial(1), id="a DIAL from the dialler"),
    ],
)
async def test_a_message_out_of_place_ends_the_link(message: Message, clock: object) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        link_of(session)._connection.send(encode(message))
        with trio.fail_after(2):
            await session.closed.wait()
        assert session.close_reason == f"a {type(message).__name__} message out of place"


@pytest.mark.parametrize("numbers", [(2,), (1, 1)])
async def test_a_listener_that_asks_for_nonsense_loses_its_link(
    numbers: tuple[int, ...], clock: object
) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        [bobs] = pair.bob.endpoint.sessions()
        for number in numbers:
            link_of(bobs)._connection.send(encode(Dial(number)))
        with trio.fail_after(2):
            await session.closed.wait()
        assert session.close_reason is not None
        assert "asked for twice" in session.close_reason


async def test_a_listener_cannot_make_its_dialler_dial_without_end(clock: object) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        [bobs] = pair.bob.endpoint.sessions()
        for number in range(1, 2 * 2000, 2):
            link_of(bobs)._connection.send(encode(Dial(number)))
        await trio.sleep(2)
        assert len(link_of(session)._channels) <= MAX_CHANNELS
