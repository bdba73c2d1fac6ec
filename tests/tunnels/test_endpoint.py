"""Two nodes meet, part, die, restart: what each of them is told."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from tests.lab.datagrams import Weather, World
from tests.lab.nodes import Pair, echo, exchange, identity, start_node, two_nodes
from tests.tunnels.conftest import over_every_kind, over_quic
from tunnels import (
    AddressPolicy,
    Candidate,
    DialFailed,
    Endpoint,
    ListenFailed,
    PeerId,
    Session,
    SessionClosed,
    SessionDown,
    SessionUp,
    Stream,
    StreamLost,
    StreamRefused,
    StreamReset,
    TunnelError,
    WrongPeer,
)
from tunnels.door import MAX_HALF_OPEN_PER_NETWORK, UNCHECKED_HALF_OPEN
from tunnels.quic import UNSENT_BYTES

STRANGER = identity("stranger").peer

pytestmark = pytest.mark.usefixtures("link_kind")


async def test_connecting_twice_gives_the_same_session(
    autojump_clock: trio.testing.MockClock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        events = pair.bob.endpoint.subscribe()
        session = await pair.connect()
        assert await pair.connect() is session
        assert pair.alice.endpoint.session(pair.bob.endpoint.peer) is session
        assert pair.alice.endpoint.sessions() == [session]
        up = await events.receive()
        assert isinstance(up, SessionUp)
        assert up.peer == pair.alice.endpoint.peer
        assert session.stats.link_kind == link_kind
        await trio.sleep(3)
        assert session.rtt_s == pytest.approx(0.02, abs=0.005)


async def test_places_that_others_know_of_follow_our_own_each_once(
    autojump_clock: trio.testing.MockClock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        bob = pair.bob.endpoint
        [own] = bob.candidates()
        far = Candidate(link_kind, "198.18.7.7", 4242, "mapped")
        known = [Candidate(link_kind, own.host, own.port, "reflexive"), far]
        bob.add_candidates(lambda: known)
        bob.add_candidates(lambda: [far, Candidate("pigeon", "198.18.7.7", 4242, "mapped")])
        assert bob.candidates() == [own, far]
        known.clear()
        assert bob.candidates() == [own, far]
        assert bob.bound_ports() == {link_kind: own.port}


async def test_nobody_at_the_address_is_reported_within_8_s(
    autojump_clock: trio.testing.MockClock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        began_s = trio.current_time()
        places = [Candidate(link_kind, "11.0.0.77", 4000), Candidate(link_kind, "11.0.0.78", 4000)]
        with pytest.raises(DialFailed) as failure:
            await pair.alice.endpoint.connect(STRANGER, places)
        assert trio.current_time() - began_s <= 8
        assert "11.0.0.77:4000: nobody answered" in str(failure.value)
        assert "11.0.0.78:4000: nobody answered" in str(failure.value)
        assert [place for place, _ in failure.value.failures] == places


async def test_a_wrong_key_at_the_address_is_named_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        began_s = trio.current_time()
        with pytest.raises(DialFailed, match="wrong key") as failure:
            await pair.alice.endpoint.connect(STRANGER, pair.bob.endpoint.candidates())
        assert trio.current_time() - began_s < 1
        assert pair.bob.endpoint.peer.short in str(failure.value)
        await trio.sleep(6)
        assert pair.bob.endpoint.sessions() == []


async def test_the_certificate_is_pinned_before_a_word_is_said(
    autojump_clock: trio.testing.MockClock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        transport = pair.alice.endpoint._transports[link_kind]
        [place] = pair.bob.endpoint.candidates()
        with pytest.raises(WrongPeer):
            await transport.dial(place, STRANGER)


async def test_a_channel_holds_its_writer_while_the_network_is_away(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes(dead_after_s=60) as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        stream = await session.open("echo")
        channel = stream.channel
        assert channel is not None
        pair.world.cut = True
        with trio.move_on_after(10) as patience:
            await stream.send_all(bytes(4 * UNSENT_BYTES - 1))  # within the reader's window
        assert patience.cancelled_caught
        pair.world.cut = False
        with trio.fail_after(10):
            await channel.wait_writable()


async def test_a_refused_port_and_a_foreign_transport_are_named(
    autojump_clock: trio.testing.MockClock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        pair.world.refusing.add(("11.0.0.9", 9))
        places = [Candidate(link_kind, "11.0.0.9", 9), Candidate("pigeon", "11.0.0.9", 9)]
        began_s = trio.current_time()
        with pytest.raises(DialFailed) as failure:
            await pair.alice.endpoint.connect(STRANGER, places)
        assert trio.current_time() - began_s < 1
        assert "no node listens on that port" in str(failure.value)
        assert f"links over {link_kind} only" in str(failure.value)


async def test_no_address_and_our_own_id_are_sentences(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        alice = pair.alice.endpoint
        with pytest.raises(DialFailed, match="no address is known"):
            await alice.connect(STRANGER, [])
        with pytest.raises(TunnelError, match="own id"):
            await alice.connect(alice.peer, alice.candidates())


async def test_the_first_address_that_answers_wins(
    autojump_clock: trio.testing.MockClock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        bob = pair.bob.endpoint
        dead = [Candidate(link_kind, f"11.0.1.{number}", 4000) for number in range(3)]
        began_s = trio.current_time()
        session = await pair.alice.endpoint.connect(bob.peer, [*dead, *bob.candidates()])
        assert trio.current_time() - began_s < 1.5
        assert session.stats.remote is not None
        assert session.stats.remote.startswith("11.0.0.2:")


async def test_a_forbidden_address_is_not_contacted(
    autojump_clock: trio.testing.MockClock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        sent = pair.world.sent
        with pytest.raises(DialFailed, match="loopback"):
            await pair.alice.endpoint.connect(STRANGER, [Candidate(link_kind, "127.0.0.1", 53)])
        assert pair.world.sent == sent


async def test_both_dial_at_once_and_meet_in_one_session(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes(Weather(delay_s=0.03)) as pair:
        alice, bob = pair.alice.endpoint, pair.bob.endpoint
        alice.serve("echo", echo)
        bob.serve("echo", echo)
        data = random.Random(3).randbytes(300_000)

        async def dial(one: Endpoint, other: Endpoint) -> None:
            session = await one.connect(other.peer, other.candidates())
            async with await session.open("echo") as stream:
                assert await exchange(stream, data) == data

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial, alice, bob)
            nursery.start_soon(dial, bob, alice)
        await trio.sleep(5)
        ours, theirs = alice.session(bob.peer), bob.session(alice.peer)
        assert ours is not None
        assert theirs is not None
        assert len(alice.sessions()) == len(bob.sessions()) == 1
        assert ours.best_link is not None
        assert theirs.best_link is not None
        assert ours.best_link.role is theirs.best_link.role.other


async def test_a_stream_moves_to_another_link_when_its_own_dies(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes(Weather(delay_s=0.02, loss=0.02)) as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await two_links(pair)
        stream = await session.open("echo")
        data = random.Random(4).randbytes(3 << 20)

        async def kill_the_link() -> None:
            await trio.sleep(0.4)
            link = session.best_link
            assert link is not None
            link.close(3, "cut by the test")  # type: ignore[arg-type]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_the_link)
            assert await exchange(stream, data) == data
        assert len(session._links) == 1
        await trio.sleep(1)
        assert not session._streams


async def two_links(pair: Pair) -> Session:
    """A session over two links: both sides dialled at the same moment."""
    alice, bob = pair.alice.endpoint, pair.bob.endpoint
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.connect, bob.peer, bob.candidates())
        nursery.start_soon(bob.connect, alice.peer, alice.candidates())
    await trio.sleep(1)
    session = alice.session(bob.peer)
    assert session is not None
    assert len(session._links) == 2
    return session


@over_every_kind
async def test_an_unknown_service_is_refused_though_data_was_under_way(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        stream = await session.open("nonsense")
        with pytest.raises(StreamRefused, match="'nonsense' is not offered"):
            await stream.send_all(bytes(8 << 20))
        with pytest.raises(StreamRefused):
            await stream.receive_some()
        await stream.aclose()
        assert not session.closed.is_set()
        await trio.sleep(1)
        assert not session._streams


@over_every_kind
async def test_rules_are_asked_for_every_stream(autojump_clock: trio.testing.MockClock) -> None:
    asked: list[tuple[PeerId, str]] = []

    def rules(peer: PeerId, service: str) -> bool:
        asked.append((peer, service))
        if service == "broken":
            raise RuntimeError("a bug in the rules")
        return service == "yes"

    async with trio.open_nursery() as nursery:
        world = World()
        nursery.start_soon(world.run)
        alice = await start_node(nursery, world.host("11.0.0.1"), "alice")
        bob = await start_node(nursery, world.host("11.0.0.2"), "bob", authorize=rules)
        for service in ("yes", "no", "broken"):
            bob.endpoint.serve(service, echo)
        session = await alice.endpoint.connect(bob.endpoint.peer, bob.endpoint.candidates())
        for service in ("yes", "yes", "no", "broken"):
            stream = await session.open(service)
            if service == "yes":
                assert await exchange(stream, b"hello") == b"hello"
            else:
                with pytest.raises(StreamRefused):
                    await stream.receive_some()
        assert asked == [(alice.endpoint.peer, s) for s in ("yes", "yes", "no", "broken")]
        nursery.cancel_scope.cancel()


@over_every_kind
async def test_a_prefix_serves_all_below_it_and_the_longest_wins(
    autojump_clock: trio.testing.MockClock,
) -> None:
    def answer(word: bytes) -> object:
        async def handler(stream: Stream) -> None:
            await stream.send_all(word + b":" + stream.service.encode())

        return handler

    async with two_nodes() as pair:
        serve = pair.bob.endpoint.serve
        serve("rpc/", answer(b"any"))  # type: ignore[arg-type]
        serve("rpc/a/", answer(b"a"))  # type: ignore[arg-type]
        serve("rpc/a/b", answer(b"exact"))  # type: ignore[arg-type]
        session = await pair.connect()
        for service, word in (("rpc/1", "any"), ("rpc/a/1", "a"), ("rpc/a/b", "exact")):
            stream = await session.open(service)
            assert await stream.receive_some() == f"{word}:{service}".encode()
        with pytest.raises(StreamRefused):
            await (await session.open("rpc")).receive_some()


@over_every_kind
async def test_a_failing_handler_resets_its_stream_and_nothing_else(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(stream: Stream) -> None:
        await stream.receive_some()
        raise RuntimeError("boom")

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("fail", fail)
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        stream = await session.open("fail")
        await stream.send_all(b"x")
        with pytest.raises(StreamReset, match="the service failed"):
            await stream.receive_some()
        assert "boom" in caplog.text
        assert await exchange(await session.open("echo"), b"still here") == b"still here"


async def test_a_handler_whose_peer_is_lost_leaves_one_line_in_the_log(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tunnels")

    async def wait(stream: Stream) -> None:
        await stream.receive_some()

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("wait", wait)
        session = await pair.connect()
        await (await session.open("wait")).send_all(b"")
        await trio.sleep(1)
        session.end("\x1b[2Jbye")
        await trio.sleep(1)
        assert "the handler of 'wait' ended early" in caplog.text
        assert "Traceback" not in caplog.text
        assert "?[2Jbye" in caplog.text, "and a peer's words are shown without its tricks"


@over_every_kind
async def test_a_reset_reaches_the_other_side_with_its_reason(
    autojump_clock: trio.testing.MockClock,
) -> None:
    seen: list[str] = []

    async def reader(stream: Stream) -> None:
        try:
            while await stream.receive_some():
                pass
        except StreamReset as reset:
            seen.append(str(reset))

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("reader", reader)
        session = await pair.connect()
        stream = await session.open("reader")
        await stream.send_all(b"half a trans")
        stream.reset("changed my mind")
        with pytest.raises(StreamReset, match="changed my mind"):
            await stream.send_all(b"fer")
        await trio.sleep(1)
        assert seen == ["changed my mind"]


@over_every_kind
async def test_closing_before_all_is_read_stops_the_writer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stopped = trio.Event()

    async def chatter(stream: Stream) -> None:
        with pytest.raises(StreamReset, match="reads no more"):
            await send_for_ever(stream)
        stopped.set()

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("chatter", chatter)
        session = await pair.connect()
        stream = await session.open("chatter")
        await stream.receive_some()
        await stream.aclose()
        with trio.fail_after(5):
            await stopped.wait()
        await trio.sleep(1)
        assert not session._streams


async def send_for_ever(stream: Stream) -> None:
    while True:
        await stream.send_all(bytes(10_000))


@over_every_kind
async def test_an_answer_survives_the_handler_that_ignores_the_question(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def answer(stream: Stream) -> None:
        await stream.send_all(b"no thanks")

    async with two_nodes() as pair:
        pair.bob.endpoint.serve("answer", answer)
        session = await pair.connect()
        stream = await session.open("answer")
        await stream.send_all(b"a long question" * 1000)
        await trio.sleep(1)
        assert await stream.receive_some() == b"no thanks"
        assert await stream.receive_some() == b""


@over_every_kind
async def test_a_goodbye_is_noticed_at_once_with_its_reason(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        events = pair.bob.endpoint.subscribe()
        session = await pair.connect()
        await session.aclose("maintenance")
        assert session.close_reason == "maintenance"
        with pytest.raises(SessionClosed, match="maintenance"):
            await session.open("echo")
        assert isinstance(await events.receive(), SessionUp)
        with trio.fail_after(0.5):
            down = await events.receive()
        assert isinstance(down, SessionDown)
        assert down.reason == "maintenance"
        assert down.peer == pair.alice.endpoint.peer
        assert pair.bob.endpoint.sessions() == []


async def test_what_was_sent_before_closing_arrives_before_the_goodbye(
    autojump_clock: trio.testing.MockClock,
) -> None:
    data = random.Random(7).randbytes(400_000)
    got = bytearray()
    ended = trio.Event()

    async def keep(stream: Stream) -> None:
        while piece := await stream.receive_some():
            got.extend(piece)
        ended.set()

    async with two_nodes(Weather(delay_s=0.03)) as pair:
        pair.bob.endpoint.serve("keep", keep)
        session = await pair.connect()
        stream = await session.open("keep")
        await stream.send_all(data)
        await stream.aclose()
        await session.aclose("that was all")
        with trio.fail_after(1):
            await ended.wait()
        assert got == data


async def test_connecting_to_a_silent_peer_finds_its_new_process(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        old = await pair.connect()
        pair.bob.kill()
        await trio.sleep(5)
        assert old.suspected
        bob = await start_node(pair.nursery, pair.world.host("11.0.0.3"), "bob")
        alice = pair.alice.endpoint
        new = await alice.connect(bob.endpoint.peer, bob.endpoint.candidates())
        assert new is not old
        assert old.close_reason == "the peer has restarted"
        assert alice.sessions() == [new]


async def test_subscribers_hear_the_end_of_the_endpoint(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        events = pair.bob.endpoint.subscribe()
        await pair.connect()
        pair.bob.stop()
        kinds = [type(event) async for event in events]
        assert kinds == [SessionUp, SessionDown]


async def test_a_node_that_stops_says_so(autojump_clock: trio.testing.MockClock) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        stream = await session.open("echo")
        await trio.sleep(1)
        pair.bob.stop()
        with trio.fail_after(0.5):
            await session.closed.wait()
        assert session.close_reason == "the node is stopping"
        with pytest.raises(StreamLost, match="the node is stopping"):
            await stream.receive_some()


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.015, 0.025, 0.045])
async def test_a_node_that_stops_in_the_middle_of_a_dial_says_so(
    autojump_clock: trio.testing.MockClock, after_s: float
) -> None:
    async with two_nodes() as pair, trio.open_nursery() as nursery:

        async def connect() -> None:
            with pytest.raises(TunnelError):
                await pair.connect()

        nursery.start_soon(connect)
        await trio.sleep(after_s)
        pair.alice.stop()


async def test_a_killed_peer_is_suspected_after_3_s_and_given_up_after_10(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        stream = await session.open("echo")
        await trio.sleep(2)
        pair.bob.kill()
        began_s = trio.current_time()
        await trio.sleep(4.5)
        assert session.suspected
        assert not session.closed.is_set()
        with pytest.raises(StreamLost, match=r"no answer for 1[01] s"):
            await stream.receive_some()
        assert 9 <= trio.current_time() - began_s <= 12
        assert pair.alice.endpoint.sessions() == []


async def test_a_restarted_peer_fails_the_old_streams_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        alice = pair.alice.endpoint
        events = alice.subscribe()
        pair.bob.endpoint.serve("echo", echo)
        old = await pair.connect()
        stream = await old.open("echo")
        await trio.sleep(1)
        pair.bob.kill()
        host = pair.world.host("11.0.0.3")
        bob = await start_node(pair.nursery, host, "bob")
        began_s = trio.current_time()
        await bob.endpoint.connect(alice.peer, alice.candidates())
        with pytest.raises(StreamLost, match="restarted"):
            await stream.receive_some()
        assert trio.current_time() - began_s < 1
        kinds = [type(await events.receive()) for _ in range(3)]
        assert kinds == [SessionUp, SessionDown, SessionUp]
        assert alice.session(bob.endpoint.peer) is not old


@over_quic
async def test_garbage_leaves_no_trace(autojump_clock: trio.testing.MockClock) -> None:
    dice = random.Random(5)
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        bob = pair.bob.endpoint.candidates()[0]
        transport = pair.bob.endpoint._transports["quic"]
        links_before = len(transport._links)  # type: ignore[attr-defined]
        for _ in range(500):
            noise = bytearray(dice.randbytes(dice.choice([0, 1, 5, 9, 30, 1200, 1400])))
            if noise and dice.random() < 0.5:
                noise[0] |= 0xC0  # looks like an Initial
                noise[1:5] = b"\x00\x00\x00\x01"
                noise[5:6] = b"\x08"
            pair.world.inject(bytes(noise), ("11.6.6.6", 666), (bob.host, bob.port))
        pair.world.record = True
        assert await exchange(await session.open("echo"), b"hello") == b"hello"
        assert len(transport._links) == links_before  # type: ignore[attr-defined]
        assert not [one for one in pair.world.log if one[0][0] == "11.6.6.6"]


@over_quic
async def test_mangled_copies_of_real_datagrams_do_no_harm(
    autojump_clock: trio.testing.MockClock,
) -> None:
    dice = random.Random(6)
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        pair.world.record = True
        session = await pair.connect()
        data = dice.randbytes(200_000)
        assert await exchange(await session.open("echo"), data) == data
        for target, datagram in list(pair.world.log):
            mangled = bytearray(datagram)
            mangled[dice.randrange(len(mangled))] ^= 1 << dice.randrange(8)
            pair.world.inject(bytes(mangled), ("11.6.6.6", 666), target)
        await trio.sleep(5)
        assert await exchange(await session.open("echo"), data) == data
        assert session.stats.remote is not None
        assert session.stats.remote.startswith("11.0.0.2")


@over_quic
async def test_strangers_that_never_prove_themselves_are_few_and_forgotten(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        await pair.connect()
        bob = pair.bob.endpoint.candidates()[0]
        transport = pair.bob.endpoint._transports["quic"]
        for number in range(200):
            stranger = (f"11.7.{number % 100}.1", number)
            pair.world.inject(first_initial(), stranger, (bob.host, bob.port))
        for number in range(30):
            pair.world.inject(first_initial(), ("11.8.0.1", number), (bob.host, bob.port))
        await trio.testing.wait_all_tasks_blocked()
        # alice was the first of those that were taken at their word
        assert transport._door.half_open == UNCHECKED_HALF_OPEN - 1  # type: ignore[attr-defined]
        await trio.sleep(6)
        assert transport._door.half_open == 0  # type: ignore[attr-defined]
        assert len(pair.bob.endpoint.sessions()) == 1


@over_quic
async def test_one_stranger_cannot_take_all_the_room(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        bob = pair.bob.endpoint.candidates()[0]
        transport = pair.bob.endpoint._transports["quic"]
        for number in range(30):
            pair.world.inject(first_initial(), ("11.8.0.1", number), (bob.host, bob.port))
        await trio.testing.wait_all_tasks_blocked()
        assert transport._door.half_open_from("11.8.0.1") == (  # type: ignore[attr-defined]
            MAX_HALF_OPEN_PER_NETWORK
        )
        await pair.connect()


@over_quic
async def test_a_stranger_may_say_little_and_not_for_long(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        transport = pair.alice.endpoint._transports["quic"]
        bob = pair.bob.endpoint
        [place] = bob.candidates()
        loud = await transport.dial(place, bob.peer)
        control, other = await loud.open_channel(), await loud.open_channel()
        control.send(b"\x01")
        other.send(bytes(100_000))
        with trio.fail_after(2):
            await loud.closed.wait()
        assert loud.closure is not None
        assert loud.closure.reason == "too much data before the handshake"
        silent = await transport.dial(place, bob.peer)
        with trio.fail_after(6):
            await silent.closed.wait()
        assert silent.closure is not None
        assert silent.closure.by_peer
        assert bob.sessions() == []


def first_initial() -> bytes:
    """The first datagram of a new QUIC connection to a mesh node."""
    quic = QuicConnection(
        configuration=QuicConfiguration(is_client=True, alpn_protocols=["mesh/1"])
    )
    quic.connect(("peer", 0), now=0.0)
    return quic.datagrams_to_send(now=0.0)[0][0]


async def test_a_port_in_use_is_a_sentence() -> None:
    host = World().host("11.0.0.1")
    host.bind(None, 4000)
    endpoint = Endpoint(identity("alice"), authorize=lambda *_: True, network=host)
    with pytest.raises(ListenFailed, match="port is in use"):
        await endpoint.run(None, 4000)


async def test_private_addresses_need_a_private_network_or_leave(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        world = World()
        nursery.start_soon(world.run)
        public = await start_node(nursery, world.host("11.0.0.1"), "alice")
        bob = await start_node(nursery, world.host("10.0.0.2"), "bob")
        place, peer = bob.endpoint.candidates(), bob.endpoint.peer
        with pytest.raises(DialFailed, match="private"):
            await public.endpoint.connect(peer, place)
        allowed = await start_node(
            nursery,
            world.host("11.0.0.3"),
            "carol",
            policy=AddressPolicy(allow_private=True),
        )
        assert await allowed.endpoint.connect(peer, place)
        neighbour = await start_node(nursery, world.host("10.9.9.9"), "dave")
        assert await neighbour.endpoint.connect(peer, place)
        nursery.cancel_scope.cancel()
