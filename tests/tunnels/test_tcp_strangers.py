"""What strangers may do at the port where a node listens for TCP, and whom TLS turns away."""

from __future__ import annotations

import ssl

import pytest
import trio
import trio.testing

from tests.lab.connections import FakeConnection
from tests.lab.nodes import Pair, echo, exchange, two_nodes
from tests.lab.tcp import LATE_S, connection_to, is_turned_away, link_of, transport_of
from tests.tunnels.conftest import over_tcp
from tests.tunnels.test_identity_attacks import MALLORY, Conversation, dialler, raw_link, run
from tunnels import DialFailed, LinkClosed
from tunnels import tls as tunnel_tls
from tunnels.door import MAX_HALF_OPEN, MAX_HALF_OPEN_PER_NETWORK
from tunnels.link import CloseCode
from tunnels.tcp import TcpLink
from tunnels.tcp_connection import Connection
from tunnels.tcp_transport import FIRST_WORDS_TIMEOUT_S
from tunnels.tcp_wire import Control, Dial, encode

pytestmark = [pytest.mark.usefixtures("link_kind"), over_tcp]


# --- strangers -----------------------------------------------------------------------------


async def knock(pair: Pair, host: str) -> FakeConnection:
    [place] = pair.bob.endpoint.candidates()
    connection = await pair.world.host(host).connect((place.host, place.port))
    assert isinstance(connection, FakeConnection)
    return connection


async def test_strangers_are_few_and_forgotten(clock: object) -> None:
    async with two_nodes() as pair:
        door = transport_of(pair.bob.endpoint)._door

        async def one(host: str) -> None:
            await knock(pair, host)

        async with trio.open_nursery() as nursery:
            for number in range(3 * MAX_HALF_OPEN):
                nursery.start_soon(one, f"11.7.{number}.1")
            for _ in range(2 * MAX_HALF_OPEN_PER_NETWORK):
                nursery.start_soon(one, "11.8.0.1")
        await trio.sleep(LATE_S)
        assert door.half_open == MAX_HALF_OPEN
        assert door.half_open_from("11.8.0.1") <= MAX_HALF_OPEN_PER_NETWORK
        await trio.sleep(FIRST_WORDS_TIMEOUT_S + LATE_S)
        assert door.half_open == 0
        await pair.connect()


async def test_a_peer_opens_streams_while_strangers_fill_the_room(clock: object) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        for number in range(MAX_HALF_OPEN):
            await knock(pair, f"11.7.{number}.1")
        streams = [await session.open("echo") for _ in range(50)]
        for stream in streams:
            assert await exchange(stream, b"hello") == b"hello"


async def test_a_stranger_may_say_little_before_its_proof(clock: object) -> None:
    async with two_nodes() as pair:
        loud = await raw_link(pair)
        assert isinstance(loud, TcpLink)
        for _ in range(4):
            loud._connection.send(encode(Control(b"\x01\x00\x03" + bytes(30_000))))
        with trio.fail_after(2):
            await loud.closed.wait()
        assert loud.closure is not None
        assert loud.closure.code is CloseCode.PROTOCOL_ERROR
        assert pair.bob.endpoint.sessions() == []


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", id="HTTP"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="SSH"),
        pytest.param(b"\x16\x03\x01" + bytes(300), id="a TLS record of nothing"),
        pytest.param(bytes(100_000), id="zeroes"),
    ],
)
async def test_another_protocol_on_the_port_is_dropped(words: bytes, clock: object) -> None:
    async with two_nodes() as pair:
        connection = await knock(pair, "11.6.6.6")
        connection.send(words)
        with trio.fail_after(FIRST_WORDS_TIMEOUT_S + LATE_S):
            try:
                while await connection.receive():
                    pass
            except OSError:
                pass
        await trio.sleep(LATE_S)
        assert transport_of(pair.bob.endpoint)._door.half_open == 0
        await pair.connect()


async def test_a_first_word_that_is_none_is_turned_away(clock: object) -> None:
    async with two_nodes() as pair:
        connection = await connection_to(pair)
        connection.send(encode(Dial(1)))
        assert await is_turned_away(connection)


# --- TLS -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offered", [["h2"], ["mesh/2"], []])
async def test_another_application_protocol_is_turned_away(
    offered: list[str], clock: object
) -> None:
    async with two_nodes() as pair:
        context = tunnel_tls.dialler_context()
        if offered:
            context.set_alpn_protocols(offered)
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        transport_of(pair.alice.endpoint)._dialler_context = context
        with pytest.raises(DialFailed, match="another protocol"):
            await pair.connect()
        await trio.sleep(FIRST_WORDS_TIMEOUT_S + LATE_S)
        assert pair.bob.endpoint.sessions() == []


async def test_tls_before_1_3_is_turned_away(clock: object) -> None:
    async with two_nodes() as pair:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        transport_of(pair.alice.endpoint)._dialler_context = context
        with pytest.raises(DialFailed, match="TLS handshake"):
            await pair.connect()


async def test_there_are_no_tickets(clock: object) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        await trio.sleep(LATE_S)
        inner = link_of(session)._connection.tls._object
        assert inner.version() == "TLSv1.3"
        assert inner.session is None or not inner.session.has_ticket
        assert not inner.session_reused


async def test_each_connection_has_a_fingerprint_both_ends_agree_on(clock: object) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        [bobs] = pair.bob.endpoint.sessions()
        ours = link_of(session)._connection.tls.fingerprint
        assert ours == link_of(bobs)._connection.tls.fingerprint
        assert len(ours) >= 32
        assert (await connection_to(pair)).tls.fingerprint != ours


async def test_a_certificate_that_changes_between_connections_ends_the_link(
    clock: object,
) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        link = link_of(session)
        transport = transport_of(pair.alice.endpoint)
        dial = transport._dial

        async def changed(*given: object) -> tuple[Connection, bytes]:
            return (await dial(*given))[0], bytes(32)  # type: ignore[arg-type]

        transport._dial = changed  # type: ignore[method-assign,assignment]
        with pytest.raises(LinkClosed, match="another certificate"):
            await link.open_channel()


async def test_a_peer_is_known_by_its_proof_not_by_its_connection(clock: object) -> None:
    """Mallory proves her own key over a link to bob, and is mallory there."""
    async with two_nodes() as pair:
        link = await raw_link(pair)
        talk = await Conversation.over(link)
        await run(dialler(MALLORY, link, pair.bob.endpoint.peer), talk)
        await trio.sleep(LATE_S)
        assert [one.peer for one in pair.bob.endpoint.sessions()] == [MALLORY.peer]
