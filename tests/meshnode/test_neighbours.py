"""Members sighted on the local network are dialled there; who only says so is held at a distance.

The network here is made of memory; the real one is in tests/netlab/test_mdns.py.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from discovery.announcement import ENTROPY_BYTES, encode_announcement
from meshnode import neighbours
from meshnode.dialling import JOIN_TIMEOUT_S
from meshnode.errors import AccessError, MeshError
from meshnode.events import Kind
from meshnode.neighbours import Neighbours
from tests.lab.datagrams import World
from tests.lab.lan import FakeLan
from tests.lab.nodes import identity
from tests.lab.parties import Party, parties, party, world_of_parties
from tunnels import Candidate, DialFailed, Identity, PeerId, Stream
from tunnels.interfaces import InterfaceWatch

Clock = trio.testing.MockClock
NOBODY_THERE = (Candidate("quic", "11.0.0.66", 4433),)
SOON_S = 1.0


@pytest.fixture
def lan(monkeypatch: pytest.MonkeyPatch) -> FakeLan:
    made = FakeLan()
    monkeypatch.setattr(neighbours, "open_mdns", made.open)
    return made


def live(node: Party) -> Neighbours:
    """The node keeps its sessions up, and takes part in the local network."""
    found = Neighbours(
        node.endpoint, node.membership, node.connections.dialling, node.events.append
    )
    node.connections.look_around = found.look_around
    node.nursery.start_soon(found.run)
    node.run_connections()
    return found


@asynccontextmanager
async def alone(tmp_path: Path) -> AsyncIterator[tuple[World, Party]]:
    """Alice's node, in a world where others may come up."""
    async with (
        world_of_parties() as world,
        party(tmp_path, world.host("11.0.0.1"), "alice") as alice,
    ):
        yield world, alice


@asynccontextmanager
async def alone_and_live(tmp_path: Path) -> AsyncIterator[tuple[World, Party]]:
    """Alice takes part in the local network; the world records all that she sends from now on."""
    async with alone(tmp_path) as (world, alice):
        live(alice)
        await trio.sleep(SOON_S)
        world.record = True
        yield world, alice


@asynccontextmanager
async def after_bob_left(tmp_path: Path) -> AsyncIterator[tuple[World, Party, PeerId]]:
    """Alice has met Bob, who is not any more where she met him (11.0.0.2)."""
    async with alone(tmp_path) as (world, alice):
        async with party(tmp_path, world.host("11.0.0.2"), "bob") as bob:
            await alice.connections.join(bob.invite())
            await forget_each_other(alice, bob)
        yield world, alice, bob.peer


async def forget_each_other(one: Party, other: Party) -> None:
    one.session(other).end("the test parts them")
    await trio.sleep(SOON_S)


async def test_a_member_that_moved_is_found_where_it_says_it_is(
    tmp_path: Path, autojump_clock: Clock, lan: FakeLan
) -> None:
    async with after_bob_left(tmp_path) as (world, alice, bobs_id):
        live(alice)
        await trio.sleep(20)
        assert not alice.membership.is_introduced(bobs_id)
        async with party(tmp_path, world.host("11.0.0.9"), "bob") as bob:
            live(bob)
            await trio.sleep(SOON_S)
            assert alice.knows(bob)
            assert alice.session(bob).stats.remote == "11.0.0.9:4433"


@pytest.mark.parametrize("after_s", [1.0, 15.2], ids=["while it is dialled", "between two dials"])
async def test_a_sighting_does_not_wait_for_a_dial_that_leads_nowhere(
    after_s: float, tmp_path: Path, autojump_clock: Clock
) -> None:
    async with (
        after_bob_left(tmp_path) as (world, alice, _),
        party(tmp_path, world.host("11.0.0.9"), "bob") as bob,
    ):
        alice.run_connections()
        await trio.sleep(after_s)
        alice.connections.dialling.sighted(bob.peer, bob.endpoint.candidates())
        await trio.sleep(0.5)
        assert alice.knows(bob)


async def test_a_dial_is_given_up_when_the_peer_comes_to_us(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with (
        after_bob_left(tmp_path) as (world, alice, _),
        party(tmp_path, world.host("11.0.0.9"), "bob") as bob,
    ):
        alice.run_connections()
        await trio.sleep(1)
        await bob.meet(alice)
        await trio.sleep(0.5)
        assert alice.connections.settled.is_set()
        assert alice.knows(bob)


async def test_a_member_that_announces_itself_over_and_over_is_not_dialled_each_time(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with after_bob_left(tmp_path) as (world, alice, bobs_id):
        alice.run_connections()
        world.record = True
        for number in range(100):
            there = (Candidate("quic", f"11.0.1.{number}", 4433),)
            alice.connections.dialling.sighted(bobs_id, there)
            await trio.sleep(0.1)
        dialled = {target[0] for target, _ in world.log} - {"11.0.0.2"}
        assert 3 <= len(dialled) <= 6, "three at once, then one in five seconds"


async def test_nothing_is_kept_of_a_stranger_that_is_sighted(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with alone(tmp_path) as (world, alice):
        alice.run_connections()
        world.record = True
        alice.connections.dialling.sighted(identity("stranger").peer, NOBODY_THERE)
        await trio.sleep(60)
        assert world.log == []
        assert alice.connections.dialling._sighted == {}


async def test_members_who_never_met_find_each_other(
    tmp_path: Path, autojump_clock: Clock, lan: FakeLan
) -> None:
    """Invited by the same founder, at different times; the founder has gone."""
    async with parties(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        for one in (ann, ben):
            await one.connections.join(founder.invite())
            await forget_each_other(one, founder)
        assert ann.membership.member(ben.peer) is None
        live(ann)
        live(ben)
        await trio.sleep(SOON_S)
        assert ann.knows(ben)
        assert ben.knows(ann)


async def test_a_mesh_joined_later_shows_and_is_seen_at_once(
    tmp_path: Path, autojump_clock: Clock, lan: FakeLan
) -> None:
    async with parties(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        await ann.connections.join(founder.invite())
        await forget_each_other(ann, founder)
        live(ann)
        live(ben)
        await trio.sleep(SOON_S)
        before = lan.last_word_of(ben)
        await ben.connections.join(founder.invite())
        await trio.sleep(SOON_S)
        assert ben.knows(ann)
        after = lan.last_word_of(ben)
        assert after.is_of(founder.mesh)
        assert before.salt != after.salt
        assert len(before.tags) == len(after.tags), "how many meshes there are does not show"


async def test_who_was_a_stranger_is_looked_for_again_when_a_mesh_is_joined(
    tmp_path: Path, autojump_clock: Clock, lan: FakeLan
) -> None:
    """ann has announced herself and does not listen."""
    async with parties(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        await ann.connections.join(founder.invite())
        await forget_each_other(ann, founder)
        live(ben)
        await trio.sleep(SOON_S)
        async with lan.open() as her_station:
            there = ann.endpoint.candidates()
            her_word = announced(ann.endpoint.identity, founder, there, 0)
            await her_station.announce(ann.peer, her_word, there)
            await trio.sleep(SOON_S)
            assert not ben.knows(ann)
            await ben.connections.join(founder.invite())
            await trio.sleep(SOON_S)
            assert ben.knows(ann)


async def test_who_knows_the_mesh_and_is_no_member_is_met_once_in_a_while(
    tmp_path: Path, autojump_clock: Clock, lan: FakeLan, caplog: pytest.LogCaptureFixture
) -> None:
    async with parties(tmp_path, "alice", "out") as (alice, out):
        live(alice)
        await trio.sleep(SOON_S)
        heard: list[float] = []

        for seq in range(300):
            if out.endpoint.session(alice.peer):
                heard.append(trio.current_time())
                out.session(alice).end("the test ends it")
            lan.say(announced(out.endpoint.identity, alice, out.endpoint.candidates(), seq))
            await trio.sleep(1)
        assert not alice.membership.is_introduced(out.peer)
        assert 2 <= len(heard) <= 6, "in five minutes"
        assert caplog.text.count("cannot be met") == 1


async def test_a_crowd_that_is_made_up_is_dialled_at_a_bounded_rate(
    tmp_path: Path, autojump_clock: Clock, lan: FakeLan, caplog: pytest.LogCaptureFixture
) -> None:
    async with alone_and_live(tmp_path) as (world, alice):
        crowd = [identity(f"ghost {number}") for number in range(200)]
        began_s = trio.current_time()
        for turn in range(3):
            for number, ghost in enumerate(crowd):
                there = (Candidate("quic", f"11.0.1.{number}", 4433),)
                lan.say(announced(ghost, alice, there, turn))
                await trio.sleep(0.05)
        dialled = {target for target, _ in world.log}
        took_s = trio.current_time() - began_s
        assert 4 <= len(dialled) <= 8 + took_s
        # Four at once, each given up after seven and a half seconds.
        assert len(dialled) <= 4 * (1 + took_s / 7.5)
        assert len(alice.endpoint.sessions()) == 0
        assert caplog.text.count("cannot be met") == 1


async def test_forgeries_are_told_of_once_and_followed_never(
    tmp_path: Path, autojump_clock: Clock, lan: FakeLan, caplog: pytest.LogCaptureFixture
) -> None:
    async with alone_and_live(tmp_path) as (world, alice):
        for seq in range(50):
            forged = announced(identity("bob"), alice, NOBODY_THERE, seq, sign=identity("eve"))
            lan.say(forged)
            lan.say(b"\x07nothing")
            await trio.sleep(0.1)
        assert world.log == []
        warnings = [one for one in caplog.records if one.levelno >= logging.WARNING]
        assert len(warnings) == 2


def announced(
    who: Identity,
    member: Party,
    places: Sequence[Candidate],
    seq: int,
    sign: Identity | None = None,
) -> bytes:
    """As somebody announces itself who knows the id of `member`'s mesh."""
    return encode_announcement(
        (sign or who).sign,
        peer=who.peer,
        seq=2**50 + seq,
        version="0.1.0",
        name="ghost",
        places=places,
        meshes=(member.mesh,),
        entropy=bytes(ENTROPY_BYTES),
    )


async def test_to_meet_somebody_is_no_proof(tmp_path: Path, autojump_clock: Clock) -> None:
    async with parties(tmp_path, "alice", "stranger") as (alice, stranger):
        there = stranger.endpoint.candidates()
        with pytest.raises(AccessError, match="knows no mesh"):
            await alice.connections.dialling.meet(stranger.peer, there, (alice.mesh,))
        with pytest.raises(DialFailed):
            await alice.connections.dialling.meet(identity("else").peer, there, (alice.mesh,))
        assert alice.membership.members() == ()


async def never(_stream: Stream) -> None:
    await trio.sleep_forever()


async def test_whoever_never_answers_is_not_waited_for(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "alice", "mute") as (alice, mute):
        mute.endpoint.serve("hello", never)
        with trio.fail_after(JOIN_TIMEOUT_S + 1), pytest.raises(MeshError):
            await alice.connections.dialling.meet(
                mute.peer, mute.endpoint.candidates(), (alice.mesh,)
            )


async def test_without_multicast_the_user_is_told_once_and_it_is_tried_again(
    tmp_path: Path, autojump_clock: Clock, lan: FakeLan
) -> None:
    lan.works = False
    async with parties(tmp_path, "alice") as (alice,):
        live(alice)
        await trio.sleep(3 * neighbours.TRY_AGAIN_S)
        warned = [event for event in alice.events if event.kind is Kind.WARNING]
        assert len(warned) == 1
        assert "multicast DNS cannot be used here" in warned[0].text
        lan.works = True
        await trio.sleep(neighbours.TRY_AGAIN_S + 1)
        assert any(event.data.get("mdns") for event in alice.events)


async def test_an_interface_that_goes_while_it_is_taken_up_is_no_end(
    tmp_path: Path, autojump_clock: Clock, lan: FakeLan, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def once(watch: InterfaceWatch) -> None:
        if changes:
            changes.pop()
        else:
            await trio.sleep_forever()

    changes = [1]
    monkeypatch.setattr(InterfaceWatch, "wait_changed", once)
    lan.failing_scans = 2
    async with parties(tmp_path, "alice") as (alice,):
        live(alice)
        await trio.sleep(3 * neighbours.RESCAN_AGAIN_S)
        assert lan.scans == 3
        assert len(lan.stations) == 1
        assert not alice.warnings()


async def test_whoever_misses_nobody_does_not_wait_and_who_does_not_long(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "alice", "bob") as (alice, bob):
        looking = Neighbours(alice.endpoint, alice.membership, alice.connections.dialling, print)

        async def seconds() -> float:
            began_s = trio.current_time()
            await looking.look_around()
            return trio.current_time() - began_s

        assert await seconds() == 0, "a node without members"
        await alice.connections.join(bob.invite())
        assert await seconds() == 0, "the only other member is connected"
        await forget_each_other(alice, bob)
        assert await seconds() == pytest.approx(neighbours.LOOK_S)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bob.meet, alice)
            assert await seconds() < 0.5


async def test_the_first_plan_waits_for_whoever_is_in_sight(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "alice") as (alice,):
        seen = trio.Event()
        alice.connections.look_around = seen.wait
        alice.run_connections()
        await trio.sleep(10)
        assert not alice.connections.settled.is_set()
        seen.set()
        await trio.testing.wait_all_tasks_blocked()
        assert alice.connections.settled.is_set()
