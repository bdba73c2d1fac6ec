"""What happens to the network, and what streams notice of it: a pause."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.lab.datagrams import Weather
from tests.lab.nodes import Pair, echo, exchange, identity, start_node, two_nodes
from tests.lab.talks import Talk
from tests.tunnels.conftest import over_quic
from tunnels import Candidate, Session, SessionBack, SessionClosed, SessionSilent, Stream
from tunnels.errors import StreamLost
from tunnels.heartbeat import DEAD_S
from tunnels.link import CloseCode
from tunnels.redial import GONE_AFTER_S

pytestmark = pytest.mark.usefixtures("link_kind")


RTT_S = 0.04
FLOWS_WITHIN_S = 2 * RTT_S + 0.5


@asynccontextmanager
async def pair_of(**options: float) -> AsyncIterator[Pair]:
    """Two nodes that both echo, and know where the other may be reached."""
    options.setdefault("dead_after_s", DEAD_S)
    async with two_nodes(Weather(delay_s=RTT_S / 2), **options) as pair:  # type: ignore[arg-type]
        alice, bob = pair.alice.endpoint, pair.bob.endpoint
        for one, other in ((alice, bob), (bob, alice)):
            one.serve("echo", echo)
            one.learn(other.peer, other.candidates())
        yield pair


def theirs(pair: Pair) -> Session:
    session = pair.bob.endpoint.session(pair.alice.endpoint.peer)
    assert session is not None
    return session


Fault = Callable[[Pair], Awaitable[None]]


async def talk_through(pair: Pair, fault: Fault) -> list[float]:
    """Streams of both sides, under way during the fault. Seconds from its end to the first byte
    that has come all the way since, of each."""
    session = await pair.connect()
    ends = (session, theirs(pair))
    talks = [Talk(await end.open("echo"), seed) for seed, end in enumerate(ends)]
    over = trio.Event()
    async with trio.open_nursery() as nursery:
        for talk in talks:
            nursery.start_soon(talk.run, over)
        await trio.sleep(3)
        await fault(pair)
        healed_s = trio.current_time()
        took: list[float] = []
        for talk in talks:
            await talk.heard_after(healed_s)
            took.append(talk.heard_at_s - healed_s)
        await trio.sleep(5)
        over.set()
    assert pair.alice.endpoint.sessions() == [session], "the same session as before"
    assert pair.bob.endpoint.sessions() == [ends[1]]
    assert not session.suspected
    return took


def cut_for(seconds: float) -> Fault:
    async def cut(pair: Pair) -> None:
        pair.world.cut = True
        await trio.sleep(seconds)
        pair.world.cut = False

    return cut


@pytest.mark.parametrize("seconds", [1, 2.9, 5, 20, 20.3, 20.6, 60, 110])
async def test_after_an_outage_data_flows_at_once(seconds: float, clock: object) -> None:
    async with pair_of() as pair:
        took = await talk_through(pair, cut_for(seconds))
    # One that ends before it was noticed ends with TCP's own next try, which is sooner then.
    assert max(took) <= (FLOWS_WITHIN_S if seconds > 4 else 1.1)


async def test_where_links_of_both_kinds_are_allowed_the_first_back_is_taken(
    monkeypatch: pytest.MonkeyPatch, clock: object
) -> None:
    monkeypatch.setattr("tests.lab.nodes.KINDS", ("tcp", "quic"))
    async with pair_of() as pair:
        assert max(await talk_through(pair, cut_for(20))) <= FLOWS_WITHIN_S


async def test_32_flaps_in_a_row_cost_no_byte(clock: object) -> None:
    async def flap(pair: Pair) -> None:
        dice = random.Random(32)
        for _ in range(32):
            await cut_for(dice.uniform(0.1, 6))(pair)
            await trio.sleep(dice.uniform(0, 2))

    async with pair_of() as pair:
        await talk_through(pair, flap)
        for end in (*pair.alice.endpoint.sessions(), theirs(pair)):
            assert len(end.standing) <= 2, "what was replaced is gone"


@pytest.mark.parametrize("who", ["dialler", "listener"])
async def test_a_machine_that_gets_another_address_is_followed(who: str, clock: object) -> None:
    async def move(pair: Pair) -> None:
        host = pair.alice.host if who == "dialler" else pair.bob.host
        pair.world.move(host, "11.0.0.77")

    async with pair_of() as pair:
        took = await talk_through(pair, move)
    assert max(took) <= 2, "a doubt, and a new link beside the old one"


@pytest.mark.parametrize("fault", ["the machine moves", "the NAT forgets"])
async def test_streams_that_are_opened_meanwhile_do_not_hide_that_the_others_lead_nowhere(
    fault: str, clock: object
) -> None:
    """Over TCP each is a connection of its own, from where the machine is now."""

    async def happen(pair: Pair) -> None:
        if fault == "the machine moves":
            pair.world.move(pair.alice.host, "11.0.0.77")
        else:
            port = pair.alice.endpoint.candidates()[0].port
            pair.world.rebind(("11.0.0.1", port), ("11.9.9.9", 50001))
        [session] = pair.alice.endpoint.sessions()
        pair.nursery.start_soon(chat, session)

    async def chat(session: Session) -> None:
        while True:
            stream = await session.open("echo")
            assert await exchange(stream, b"hello") == b"hello"
            await stream.aclose()
            await trio.sleep(0.3)

    async with pair_of() as pair:
        took = await talk_through(pair, happen)
    assert max(took) <= (2 if fault == "the machine moves" else 5)


@over_quic
async def test_over_quic_the_dialler_is_followed_without_a_new_link(clock: object) -> None:
    async with pair_of() as pair:
        session = await pair.connect()
        link = session.best_link
        stream = await session.open("echo")
        pair.world.move(pair.alice.host, "11.0.0.77")
        assert await exchange(stream, b"hello") == b"hello"
        assert session.standing == [link]
        assert theirs(pair).stats.remote.startswith("11.0.0.77:")  # type: ignore[union-attr]


async def test_a_nat_that_gives_another_port_is_noticed_soon(clock: object) -> None:
    async def rebind(pair: Pair) -> None:
        port = pair.alice.endpoint.candidates()[0].port
        pair.world.rebind(("11.0.0.1", port), ("11.9.9.9", 50001))

    async with pair_of() as pair:
        took = await talk_through(pair, rebind)
    assert max(took) <= 5, "nobody says so: TCP's connections fall silent"


@over_quic
async def test_a_datagram_from_elsewhere_moves_nothing_unless_it_decrypts(clock: object) -> None:
    async with pair_of() as pair:
        session = await pair.connect()
        await trio.sleep(1)
        pair.world.record = True
        await exchange(await session.open("echo"), b"hello")
        bobs = pair.bob.endpoint.candidates()[0]
        mine = [one for to, one in pair.world.log if to == (bobs.host, bobs.port)]
        where = theirs(pair).stats.remote
        for datagram in mine:
            for copy in (datagram, datagram[:-1] + bytes([datagram[-1] ^ 1])):
                pair.world.inject(copy, ("11.6.6.6", 666), (bobs.host, bobs.port))
        await trio.sleep(1)
        assert theirs(pair).stats.remote == where
        assert await exchange(await session.open("echo"), b"hello") == b"hello"


async def test_a_place_that_is_learned_meanwhile_cuts_no_try_short(clock: object) -> None:
    """A try may be what learns it: to dial through a relay is to learn where that is."""

    async def tell(pair: Pair) -> None:
        nodes = (pair.alice.endpoint, pair.bob.endpoint)
        for number in itertools.count():
            for one, other in (nodes, nodes[::-1]):
                places = other.candidates()
                elsewhere = Candidate(places[0].transport, "11.0.0.200", 1 + number % 2)
                one.learn(other.peer, [*places, elsewhere])
            await trio.sleep(0.05)

    async with pair_of() as pair:
        session = await pair.connect()
        pair.world.cut = True
        for link in (*session.standing, *theirs(pair).standing):
            link.close(CloseCode.LINK_OVER, "cut by the test")
        pair.nursery.start_soon(tell, pair)
        await trio.sleep(2)
        pair.world.cut = False
        with trio.fail_after(2):
            await session.wait_heard()


# --- streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize("opener", ["alice", "bob"])
async def test_a_stream_opened_during_an_outage_waits_for_its_end(
    opener: str, clock: object
) -> None:
    async with pair_of() as pair:
        session = await pair.connect()
        mine = session if opener == "alice" else theirs(pair)
        pair.world.cut = True
        await trio.sleep(5)
        async with trio.open_nursery() as nursery:

            async def heal() -> None:
                await trio.sleep(20)
                pair.world.cut = False

            nursery.start_soon(heal)
            assert await exchange(await mine.open("echo"), b"hello") == b"hello"


async def test_a_stream_whose_open_died_with_its_channel_is_opened_all_the_same(
    clock: object,
) -> None:
    async with pair_of() as pair:
        session = await pair.connect()
        stream = await session.open("echo")  # on its way
        await stream.send_all(b"hello")
        link = session.best_link
        assert link is not None
        pair.world.cut = True
        link.close(CloseCode.LINK_OVER, "cut by the test")
        await trio.sleep(1)
        pair.world.cut = False
        assert await stream.receive_some() == b"hello"
        nothing = await session.open("nothing")
        session.standing[0].close(CloseCode.LINK_OVER, "cut by the test")
        with pytest.raises(Exception, match="not offered"):
            await nothing.receive_some()


async def test_what_a_closed_stream_had_said_arrives_after_the_outage(clock: object) -> None:
    got, ended = bytearray(), trio.Event()

    async def keep(stream: Stream) -> None:
        while data := await stream.receive_some():
            got.extend(data)
        ended.set()

    async with pair_of() as pair:
        pair.bob.endpoint.serve("keep", keep)
        session = await pair.connect()
        stream = await session.open("keep")
        await stream.send_all(b"first ")
        await trio.sleep(1)
        pair.world.cut = True
        await stream.send_all(b"and last")
        await stream.aclose()
        await trio.sleep(90)
        assert not got.endswith(b"last")
        pair.world.cut = False
        with trio.fail_after(5):
            await ended.wait()
        assert got == b"first and last"


# --- who is gone -----------------------------------------------------------------------------


async def test_silence_ends_a_session_after_two_minutes_and_no_sooner(clock: object) -> None:
    async with pair_of() as pair:
        session = await pair.connect()
        stream = await session.open("echo")
        events = pair.alice.endpoint.subscribe()
        began_s = trio.current_time()
        pair.bob.kill()
        silent = await events.receive()
        assert isinstance(silent, SessionSilent)
        assert trio.current_time() - began_s <= 4
        with pytest.raises(StreamLost, match="no answer for 120 s"):
            await stream.receive_some()
        with pytest.raises(SessionClosed):
            await session.open("echo")
        assert 118 <= trio.current_time() - began_s <= 122


async def test_a_pause_is_told_with_its_length(clock: object) -> None:
    async with pair_of() as pair:
        await pair.connect()
        events = pair.alice.endpoint.subscribe()
        await trio.sleep(1)
        await cut_for(10)(pair)
        assert isinstance(await events.receive(), SessionSilent)
        back = await events.receive()
        assert isinstance(back, SessionBack)
        assert 9 < back.after_s < 11.5


async def test_a_machine_whose_port_is_closed_runs_the_peer_no_more(clock: object) -> None:
    async with pair_of() as pair:
        session = await pair.connect()
        places = pair.bob.endpoint.candidates()
        pair.bob.kill()
        for place in places:
            pair.world.refusing.add((place.host, place.port))
        began_s = trio.current_time()
        with trio.fail_after(3 + GONE_AFTER_S + 2):
            await session.closed.wait()
        assert trio.current_time() - began_s > GONE_AFTER_S, "one refusal is not believed"
        assert "its process has ended" in (session.close_reason or "")


async def test_refusals_with_silence_between_them_prove_nothing(clock: object) -> None:
    """So a firewall comes up with its machine, or a relay that has restarted twice."""
    async with pair_of() as pair:
        session = await pair.connect()
        places = {(one.host, one.port) for one in pair.bob.endpoint.candidates()}
        pair.world.cut = True
        await trio.sleep(5)
        for _ in range(2):
            pair.world.refusing |= places
            await trio.sleep(GONE_AFTER_S / 2)
            pair.world.refusing -= places
            await trio.sleep(20)
        assert not session.closed.is_set(), session.close_reason


async def test_another_machines_closed_port_proves_nothing(clock: object) -> None:
    async with pair_of() as pair:
        session = await pair.connect()
        elsewhere = Candidate(pair.bob.endpoint.candidates()[0].transport, "11.0.0.99", 9)
        pair.alice.endpoint.learn(session.peer, [elsewhere])
        pair.world.refusing.add(("11.0.0.99", 9))
        await cut_for(20)(pair)
        await trio.sleep(2)
        assert not session.closed.is_set()
        assert not session.suspected


async def test_a_restarted_peer_that_comes_back_fails_the_old_streams_with_a_sentence(
    clock: object,
) -> None:
    async with pair_of() as pair:
        stream = await (await pair.connect()).open("echo")
        await trio.sleep(1)
        pair.bob.kill()
        await trio.sleep(20)
        began_s = trio.current_time()
        host = pair.world.host("11.0.0.3")
        bob = await start_node(pair.nursery, host, "bob", transports=_kinds(pair))
        await bob.endpoint.connect(identity("alice").peer, pair.alice.endpoint.candidates())
        with pytest.raises(StreamLost, match="the peer has restarted"):
            await stream.receive_some()
        assert trio.current_time() - began_s < 1


async def test_who_gave_a_session_up_begins_a_new_one_and_both_know(clock: object) -> None:
    """Without that, one side would think itself introduced to the other."""
    async with pair_of() as pair:
        session = await pair.connect()
        stream = await session.open("echo")
        bobs = theirs(pair)
        pair.world.cut = True
        await trio.sleep(1)
        session.end("given up")
        pair.world.cut = False
        again = await pair.connect()
        assert again is not session
        with pytest.raises(StreamLost):
            await stream.receive_some()
        await trio.sleep(5)
        assert bobs.close_reason in ("the peer has restarted", "given up")
        [new] = pair.bob.endpoint.sessions()
        assert new is not bobs
        assert await exchange(await again.open("echo"), b"hello") == b"hello"
        assert await exchange(await new.open("echo"), b"hello") == b"hello"
        assert pair.alice.endpoint.sessions() == [again]


async def test_both_dial_again_at_once_and_stay_in_one_session(clock: object) -> None:
    async with pair_of() as pair:
        session = await pair.connect()
        bobs = theirs(pair)
        for _ in range(5):
            for one in (session, bobs):
                for link in one.standing:
                    link.close(CloseCode.LINK_OVER, "cut by the test")
            await trio.sleep(3)
            assert pair.alice.endpoint.sessions() == [session]
            assert pair.bob.endpoint.sessions() == [bobs]
            best, other = session.best_link, bobs.best_link
            assert best is not None
            assert other is not None
            assert best.role is other.role.other


def _kinds(pair: Pair) -> tuple[str, ...]:
    return tuple({place.transport for place in pair.alice.endpoint.candidates()})
