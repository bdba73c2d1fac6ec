"""What is the tcp link's own: a connection for each channel, and one port for both kinds."""

from __future__ import annotations

import errno
import socket
import tempfile
from collections.abc import Callable

import pytest
import trio
import trio.testing

from tests.lab.nodes import Pair, echo, exchange, identity, two_nodes
from tests.lab.tcp import LATE_S, connection_to, is_turned_away, link_of
from tests.tunnels.conftest import over_tcp
from tunnels import Candidate, Endpoint, LinkClosed, ListenFailed, Session, tcp_socket
from tunnels.handshake import Role
from tunnels.tcp_channels import TcpChannel
from tunnels.tcp_wire import Begin, MessageDecoder, encode

pytestmark = [pytest.mark.usefixtures("link_kind"), over_tcp]


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
