"""What is the tcp link's own: how its connections belong together, and what strangers may do."""

from __future__ import annotations

import errno
import socket
import ssl
import tempfile
from collections.abc import Callable
from functools import partial

import pytest
import trio
import trio.testing

from tests.lab import nodes
from tests.lab.connections import FakeConnection
from tests.lab.nodes import Pair, echo, exchange, identity, two_nodes
from tests.tunnels.test_identity_attacks import MALLORY, Conversation, dialler, raw_link, run
from tunnels import Candidate, DialFailed, Endpoint, LinkClosed, ListenFailed, Session, tcp_socket
from tunnels import tls as tunnel_tls
from tunnels.allowance import Budget
from tunnels.door import MAX_HALF_OPEN, MAX_HALF_OPEN_PER_NETWORK
from tunnels.frames import Open
from tunnels.frames import encode as encode_record
from tunnels.handshake import Role
from tunnels.link import CloseCode
from tunnels.tcp import MAX_CHANNELS, TcpLink
from tunnels.tcp_channels import TcpChannel
from tunnels.tcp_connection import Connection
from tunnels.tcp_transport import FIRST_WORDS_TIMEOUT_S, TcpTransport, Way
from tunnels.tcp_wire import (
    Begin,
    Control,
    Dial,
    Join,
    Message,
    MessageDecoder,
    Secret,
    channel_proof,
    encode,
)

LATE_S = 1.0


@pytest.fixture(autouse=True)
def _over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "KINDS", ("tcp",))


@pytest.fixture
def clock(autojump_clock: trio.testing.MockClock) -> trio.testing.MockClock:
    return autojump_clock


def transport_of(endpoint: Endpoint) -> TcpTransport:
    transport = endpoint._transports["tcp"]
    assert isinstance(transport, TcpTransport)
    return transport


def link_of(session: Session) -> TcpLink:
    assert isinstance(session.best_link, TcpLink)
    return session.best_link


async def connection_to(pair: Pair) -> Connection:
    """A fresh connection to bob, pinned, on which nothing was said."""
    bob = pair.bob.endpoint
    [place] = bob.candidates()
    share = Budget(trio.current_time()).share("tests")
    way = Way(partial(pair.alice.host.connect, (place.host, place.port)))
    connection, _ = await transport_of(pair.alice.endpoint)._dial(way, bob.peer, share)
    return connection


async def is_turned_away(connection: Connection) -> bool:
    with trio.move_on_after(FIRST_WORDS_TIMEOUT_S + LATE_S):
        try:
            return not await connection.receive()
        except LinkClosed:
            return True
    return False


# --- channels and their connections --------------------------------------------------------


async def test_each_stream_has_a_connection_of_its_own_which_goes_with_it(clock: object) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        streams = [await session.open("echo") for _ in range(3)]
        await trio.sleep(LATE_S)
        [bobs] = pair.bob.endpoint.sessions()
        assert len(link_of(session)._channels) == len(link_of(bobs)._channels) == 3
        for stream in streams:
            assert await exchange(stream, b"hello") == b"hello"
        await trio.sleep(LATE_S)
        assert not link_of(session)._channels
        assert not link_of(bobs)._channels
        assert session.stats.bytes_in > 0


async def test_the_listener_opens_streams_too(clock: object) -> None:
    async with two_nodes() as pair:
        pair.alice.endpoint.serve("echo", echo)
        await pair.connect()
        [bobs] = pair.bob.endpoint.sessions()
        assert link_of(bobs).role is Role.LISTENER
        for _ in range(3):
            assert await exchange(await bobs.open("echo"), b"hello") == b"hello"
        assert not link_of(bobs)._awaited
        assert not link_of(bobs)._joined


async def test_a_stalled_stream_holds_no_other(clock: object) -> None:
    async def stall(_stream: object) -> None:
        await trio.sleep_forever()

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        pair.bob.endpoint.serve("stall", stall)
        session = await pair.connect()
        stalled = await session.open("stall")
        with trio.move_on_after(5):
            await stalled.send_all(bytes(32 << 20))
        assert await exchange(await session.open("echo"), bytes(1 << 20)) == bytes(1 << 20)


async def test_without_further_connections_a_link_is_given_up_for_a_new_one(
    clock: object,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        link = link_of(session)
        pair.world.tcp_blocked = True
        with pytest.raises(LinkClosed, match="takes too long"):
            await link.open_channel()
        await trio.sleep(LATE_S)
        assert session.best_link is None
        pair.world.tcp_blocked = False
        assert await exchange(await session.open("echo"), b"hello") == b"hello"


async def test_during_an_outage_a_stream_waits_to_be_opened(clock: object) -> None:
    async with two_nodes(dead_after_s=60) as pair:
        pair.bob.endpoint.serve("echo", echo)
        pair.alice.endpoint.serve("echo", echo)
        session = await pair.connect()
        [bobs] = pair.bob.endpoint.sessions()

        async def try_one(end: Session) -> None:
            assert await exchange(await end.open("echo"), b"hello") == b"hello"

        async with trio.open_nursery() as nursery:
            pair.world.cut = True
            for end in (session, bobs):
                nursery.start_soon(try_one, end)
            await trio.sleep(20)
            pair.world.cut = False
        assert not session.closed.is_set()


async def test_a_control_connection_that_breaks_takes_the_channels_with_it_and_no_stream(
    clock: object,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        stream = await session.open("echo")
        assert isinstance(stream.channel, TcpChannel)
        connection = stream.channel.connection
        link_of(session)._connection.socket.reset()
        assert await exchange(stream, b"hello") == b"hello"
        assert connection.gone is not None
        assert pair.alice.endpoint.sessions() == [session]


async def test_a_channel_that_breaks_moves_its_stream_to_another(clock: object) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        stream = await session.open("echo")
        data = bytes(range(256)) * 8192

        async def cut() -> None:
            await trio.sleep(0.03)
            assert isinstance(stream.channel, TcpChannel)
            stream.channel.connection.socket.reset()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            assert await exchange(stream, data) == data
        assert not session.closed.is_set()


# --- who may join a link -------------------------------------------------------------------


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


# --- one port ------------------------------------------------------------------------------


def free(pair: Pair) -> Callable[..., Endpoint]:
    return lambda **options: Endpoint(
        identity("carol"),
        authorize=lambda *_: True,
        network=pair.world.host("11.0.0.3"),
        **options,
    )


async def test_both_kinds_have_the_same_port_where_it_is_free(clock: object) -> None:
    async with two_nodes() as pair:
        carol = free(pair)()
        port = await pair.nursery.start(carol.run, None, 4433)
        assert port == 4433
        assert carol.candidates() == [
            Candidate("tcp", "11.0.0.3", 4433),
            Candidate("quic", "11.0.0.3", 4433),
        ]
        dave = Endpoint(
            identity("dave"), authorize=lambda *_: True, network=pair.world.host("11.0.0.4")
        )
        pair.world.host("11.0.0.4").listen(None, 4433)
        assert await pair.nursery.start(dave.run, None, 4433) == 4433
        tcp, quic = dave.candidates()
        assert quic.port == 4433
        assert tcp.port != 4433


async def test_a_kind_of_link_that_is_none_is_refused(clock: object) -> None:
    async with two_nodes() as pair:
        for kinds in ((), ("pigeon",), ("tcp", "pigeon")):
            with pytest.raises(ValueError, match="tcp, quic"):
                free(pair)(transports=kinds)


async def test_a_folder_for_temporary_files_that_is_full_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, clock: object
) -> None:
    def full(**_options: str) -> tuple[int, str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with two_nodes() as pair:
        monkeypatch.setattr(tempfile, "mkstemp", full)
        with pytest.raises(ListenFailed, match="No space left on device; make room"):
            await free(pair)().run(None, 0)


async def test_without_a_descriptor_left_an_address_is_not_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(*_given: object, **_options: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socket", none)
    with pytest.raises(LinkClosed, match="too many open files"):
        await tcp_socket.connect(("127.0.0.1", 9))


async def test_a_bug_that_a_connection_brings_to_light_ends_it_and_not_the_node(
    monkeypatch: pytest.MonkeyPatch, clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_decoder: object) -> None:
        raise RuntimeError("boom")

    async with two_nodes() as pair:
        with monkeypatch.context() as broken:
            broken.setattr(MessageDecoder, "next_untrusted", fail)
            connection = await connection_to(pair)
            connection.send(encode(Begin()))
            assert await is_turned_away(connection)
        assert "boom" in caplog.text
        await pair.connect()
