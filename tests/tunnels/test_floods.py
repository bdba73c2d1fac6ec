"""Too much of everything: what a node holds stays bounded, and others are served meanwhile."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.lab.nodes import Pair, echo, exchange, start_node, two_nodes
from tests.lab.strangers import first_initial
from tests.tunnels.test_hostile_peers import raw_channel
from tunnels import Session, Stream, StreamRefused
from tunnels import quic_tuning as tuning
from tunnels.allowance import Share
from tunnels.credit import INITIAL_WINDOW_BYTES, POOL_BYTES
from tunnels.door import UNCHECKED_HALF_OPEN
from tunnels.frames import Open, Ping, encode, encode_data
from tunnels.gate import TALK
from tunnels.quic import UNPROVEN_DATAGRAMS, QuicLink
from tunnels.quic_channels import MAX_UNACCEPTED
from tunnels.quic_transport import QuicTransport

MIB = 1 << 20


def theirs(pair: Pair, session: Session) -> Session:
    """Bob's end of alice's session."""
    found = pair.bob.endpoint.session(pair.alice.endpoint.peer)
    assert found is not None
    assert session.peer == pair.bob.endpoint.peer
    return found


def link_of(session: Session) -> QuicLink:
    link = session.best_link
    assert isinstance(link, QuicLink)
    return link


async def deaf(_stream: Stream) -> None:
    await trio.sleep_forever()


async def greet(stream: Stream) -> None:
    await stream.send_all(b"hello")


async def test_forged_senders_do_not_keep_an_honest_newcomer_out(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """They are asked for their address, and only the honest one can answer."""
    async with two_nodes() as pair:
        bob = pair.bob.endpoint.candidates()[0]
        transport = pair.bob.endpoint._linking.transports["quic"]
        assert isinstance(transport, QuicTransport)
        pair.world.record = True
        for number in range(200):
            sender = (f"11.7.{number}.1", number)
            pair.world.inject(first_initial(), sender, (bob.host, bob.port))
        await trio.testing.wait_all_tasks_blocked()
        assert transport._door.half_open == UNCHECKED_HALF_OPEN
        retries = [len(one) for target, one in pair.world.log if target[0].startswith("11.7.")]
        assert len(retries) >= 184
        assert sum(retries) < 3 * 200 * 1200, "no more goes out than RFC 9000 8.1 allows"
        began_s = trio.current_time()
        pair.bob.endpoint.serve("echo", echo)
        assert await exchange(await (await pair.connect()).open("echo"), b"here") == b"here"
        assert trio.current_time() - began_s < 1
        assert any(one[0] & 0xF0 == 0xF0 for _, one in pair.world.log), "it was asked too"


async def test_whoever_forges_an_address_does_not_put_its_owner_in_debt(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the rate that all share is used up, as in a flood, and each hearing is dear."""
    async with two_nodes() as pair:
        bob = pair.bob.endpoint.candidates()[0]
        honest = pair.alice.endpoint.candidates()[0].host
        transport = pair.bob.endpoint._linking.transports["quic"]
        assert isinstance(transport, QuicTransport)
        transport._budget.shared.spend(trio.current_time(), 100)
        charge = Share.charge
        dearly = lambda share, spent_s, now: charge(share, spent_s + 0.01, now)  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(Share, "charge", dearly)
            for port in range(10):
                pair.world.inject(first_initial(), (honest, port), (bob.host, bob.port))
            await trio.sleep(1)
        began_s = trio.current_time()
        await pair.connect()
        assert trio.current_time() - began_s < 1


async def test_a_token_is_good_for_one_address(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        bob = pair.bob.endpoint.candidates()[0]
        transport = pair.bob.endpoint._linking.transports["quic"]
        assert isinstance(transport, QuicTransport)
        for number in range(UNCHECKED_HALF_OPEN):
            pair.world.inject(first_initial(), (f"11.7.{number}.1", 1), (bob.host, bob.port))
        await trio.testing.wait_all_tasks_blocked()
        pair.world.record = True
        session = await pair.connect()
        with_token = max(
            (one for target, one in pair.world.log if target == (bob.host, bob.port)),
            key=lambda one: one[0] & 0xF0 == 0xC0 and len(one) + 256 * bool(one[23]),
        )
        session.end("enough")
        held = transport._door.half_open
        pair.world.inject(with_token, ("11.9.9.9", 9), (bob.host, bob.port))
        await trio.testing.wait_all_tasks_blocked()
        assert transport._door.half_open == held


async def test_what_nobody_reads_is_bounded_over_all_streams_of_a_session(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("deaf", deaf)
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon((await session.open("deaf")).send_all, bytes(4 * MIB))
            await trio.sleep(20)
            streams = theirs(pair, session)._streams
            held = sum(stream._state.readable_bytes for stream in streams)
            assert held == 40 * INITIAL_WINDOW_BYTES
            assert await exchange(await session.open("echo"), b"hello") == b"hello"
            nursery.cancel_scope.cancel()


async def test_what_nobody_acknowledges_is_bounded_though_all_credit_is_granted(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def source(stream: Stream) -> None:
        while True:
            await stream.send_all(bytes(MIB))

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("source", source)
        session = await pair.connect()
        for number in range(20):
            (await raw_channel(session)).send(encode(Open(number, 2**62, "source")))
        await trio.sleep(20)
        kept = [stream._state.kept_bytes for stream in theirs(pair, session)._streams]
        assert kept == [INITIAL_WINDOW_BYTES] * 20


async def test_a_stream_that_ends_gives_its_part_of_the_pools_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        assert len(await exchange(await session.open("echo"), bytes(3 * MIB))) == 3 * MIB
        await trio.sleep(1)
        for one in (session, theirs(pair, session)):
            assert (
                one._streams._receiving.free_bytes == one._streams._keeping.free_bytes == POOL_BYTES
            )


async def test_pings_without_end_end_the_link_and_honest_ones_do_not(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        await trio.sleep(120)
        assert not session.closed.is_set()
        session._links[0].control.send(encode(Ping(1)) * 500)
        with trio.fail_after(2):
            await session.closed.wait()
        assert session.close_reason == "pings come without end"


async def test_a_one_way_channel_ends_the_link(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Nothing of ours reads those, so that they would only hold memory."""
    async with two_nodes() as pair:
        session = await pair.connect()
        bobs, link = theirs(pair, session), link_of(session)
        stream_id = link.quic.get_next_available_stream_id(is_unidirectional=True)
        link.quic.send_stream_data(stream_id, bytes(1000))
        stream = link.quic._streams[stream_id]  # and no window for what cannot come back
        stream.max_stream_data_local = stream.max_stream_data_local_sent = 1 << 40
        link.pump()
        with trio.fail_after(2):
            await session.closed.wait()
        await trio.sleep(0.1)
        assert bobs.close_reason == "a channel has two directions"


async def test_channels_opened_too_fast_wait_and_then_end_the_link(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("deaf", deaf)
        session = await pair.connect()
        began_s = trio.current_time()
        with trio.move_on_after(30):
            for number in range(20 * MAX_UNACCEPTED):
                channel = await raw_channel(session)
                channel.send(encode(Open(number, 0, "deaf")))
                channel.reset()
                await trio.sleep(0.001)
                if session.closed.is_set():
                    break
        assert session.close_reason in (
            "channels are opened faster than they are taken",
            "Too many streams open",  # QUIC's own limit, where the attacker ignores that too
        )
        assert trio.current_time() - began_s < 30


async def test_a_link_in_debt_is_not_heard_while_others_are(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        carol = await start_node(pair.nursery, pair.world.host("11.0.0.3"), "carol")
        bob = pair.bob.endpoint
        other = await carol.endpoint.connect(bob.peer, bob.candidates())
        stream = await session.open("echo")
        link_of(theirs(pair, session)).share.charge(0.6, trio.current_time())
        began_s = trio.current_time()
        await stream.send_all(b"hello")
        assert await exchange(await other.open("echo"), b"me too") == b"me too"
        assert trio.current_time() - began_s < 1, "another's debt is not ours"
        with trio.fail_after(20):
            assert await stream.receive_some() == b"hello"
        assert trio.current_time() - began_s > 3, "what was dropped came again when it was paid"
        assert not session.closed.is_set()


async def test_bytes_that_wait_for_a_reader_in_debt_stop_at_the_links_window(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("deaf", deaf)
        session = await pair.connect()
        channel = await raw_channel(session)
        channel.send(encode(Open(1, 0, "deaf")))
        await trio.sleep(1)
        bobs = link_of(theirs(pair, session))
        held = next(one for one in bobs._channels.by_stream.values() if one._id == channel._id)  # type: ignore[attr-defined]
        [stream] = theirs(pair, session)._streams
        stream._channel = None  # nobody reads it any more
        for _ in range(16):
            channel.send(encode_data(0, bytes(65536)) * 16)
        await trio.sleep(5)
        assert MIB < held.held_bytes <= tuning.LINK_WINDOW_BYTES


async def test_a_stranger_is_heard_for_so_many_datagrams(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        transport = pair.alice.endpoint._linking.transports["quic"]
        [place] = pair.bob.endpoint.candidates()
        link = await transport.dial(place, pair.bob.endpoint.peer)
        assert isinstance(link, QuicLink)
        await trio.sleep(0.1)
        bobs = pair.bob.endpoint._linking.transports["quic"]
        assert isinstance(bobs, QuicTransport)
        theirs_ = next(iter(bobs._links.values()))
        for _ in range(3 * UNPROVEN_DATAGRAMS):
            link.quic.send_ping(7)
            link.pump()
        before = theirs_.bytes_in
        await trio.sleep(0.5)
        assert theirs_.bytes_in - before < UNPROVEN_DATAGRAMS * 60


async def test_a_service_asked_too_often_refuses_and_the_session_stands(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("talk", greet, TALK)
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        answers = []
        for _ in range(20):
            stream = await session.open("talk")
            try:
                answers.append(await stream.receive_some())
            except StreamRefused as error:
                answers.append(str(error).encode())
        assert answers[:8] == [b"hello"] * 8
        assert b"asked too often" in answers[-1]
        assert await exchange(await session.open("echo"), b"hello") == b"hello"
        await trio.sleep(60)
        assert await (await session.open("talk")).receive_some() == b"hello"


async def test_datagrams_larger_than_any_node_sends_are_not_looked_at(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        before = link_of(theirs(pair, session)).bytes_in
        bob = pair.bob.endpoint.candidates()[0]
        cid = link_of(session).quic._peer_cid.cid
        pair.world.inject(b"\x40" + cid + bytes(2000), ("11.0.0.1", 1), (bob.host, bob.port))
        pair.world.inject(b"\x40" + cid + bytes(20_000), ("11.0.0.2", 1), (bob.host, bob.port))
        await trio.testing.wait_all_tasks_blocked()
        assert link_of(theirs(pair, session)).bytes_in == before
