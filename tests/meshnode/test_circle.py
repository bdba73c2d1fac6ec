"""Members find each other through each other, keep sessions with a few of many, and need no one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from discovery import neighbourhood
from discovery.grants import GRANT_LIFETIME_S, Role
from discovery.roster import Member
from meshnode import circle
from meshnode.circle import MAX_LENDERS, RELAYS, UNUSED_S, Circle
from meshnode.connections import RECONSIDER_S
from meshnode.reserving import MAX_INTRODUCERS
from tests.lab.datagrams import FakeHost
from tests.lab.parties import Party, parties
from tunnels import PeerId
from tunnels.heartbeat import CALM_INTERVAL_S, DEAD_S, SUSPECT_S

Clock = trio.testing.MockClock
DOZEN = ("founder", "inviter", *(f"node{number}" for number in range(10)))
SETTLED_S = 40.0
SOON_S = 120.0
RECONSIDERED_S = SUSPECT_S + 3 * RECONSIDER_S
"""After which a node has found others in place of the silent, whose sessions it keeps."""


async def start(*nodes: Party) -> None:
    for node in nodes:
        node.run_connections()
    await trio.testing.wait_all_tasks_blocked()


def knows_all(node: Party, nodes: list[Party]) -> bool:
    return all(node.membership.member(one.peer) for one in nodes if one is not node)


def sessions(node: Party) -> int:
    return len(node.connections.introduced())


def switch_off(node: Party) -> None:
    """Without a word."""
    network = node.endpoint._network
    assert isinstance(network, FakeHost)
    network.world.unplug(network.addresses[0])
    node.stop()


@asynccontextmanager
async def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Party]]:
    """A dozen, invited by the first of them, that keep sessions as if they were many."""
    monkeypatch.setattr(neighbourhood, "ALL_UP_TO", 4)
    monkeypatch.setattr(circle, "ALL_UP_TO", 4)
    monkeypatch.setattr(neighbourhood, "DRAWN", 2)
    async with parties(tmp_path, *DOZEN) as nodes:
        founder, *others = nodes
        await start(*nodes)
        for node in others:
            await node.connections.join(founder.invite(mesh=founder.mesh))
        yield nodes


# -- up to a dozen -----------------------------------------------------------------------------


async def test_those_whom_one_invited_find_each_other_when_it_dies(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    """A invites B, C joins by B, A dies; D, who knew A alone, and C meet, from their disks too."""
    async with parties(tmp_path, *DOZEN[:6]) as nodes:
        founder, inviter, *others = nodes
        await start(*nodes)
        await inviter.connections.join(founder.invite())
        first, last = others[0], others[-1]
        await last.connections.join(founder.invite())
        for node in others[:-1]:
            await node.connections.join(inviter.invite(mesh=founder.mesh))
        await trio.sleep(SETTLED_S)
        assert all(knows_all(node, nodes) for node in nodes)
        for dead in (founder, inviter):
            switch_off(dead)
        await trio.sleep(SETTLED_S)
        first.session(last).end("for this test")
        await trio.sleep(SETTLED_S)
        assert first.knows(last)
        assert last.knows(first)
        await trio.sleep(DEAD_S - SETTLED_S)
        assert not first.knows(founder)


async def test_of_many_each_keeps_a_few_sessions_and_news_reaches_all(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with many(tmp_path, monkeypatch) as nodes:
        founder, *others = nodes
        await trio.sleep(UNUSED_S + SOON_S)
        assert all(knows_all(node, nodes) for node in nodes)
        assert sum(map(sessions, nodes)) <= 2 * (2 + MAX_INTRODUCERS) * len(nodes)
        assert min(map(sessions, nodes)) >= 2
        changed, out = others[3], others[5]
        changed.membership.record.roles = ("lend",)
        changed.membership.notify()
        await trio.sleep(10)
        for node in nodes:
            member = node.membership.member(changed.peer)
            assert node is changed or (member is not None and member.roles == ("lend",)), node.name
        founder.desk.answer({"op": "remove", "peer": str(out.peer)})
        await trio.sleep(3)
        for node in nodes:
            assert node is out or node.membership.member(out.peer) is None, node.name
        assert out.membership.role_in(founder.mesh) is None


async def test_a_session_that_neither_side_needs_is_let_go(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with parties(tmp_path, "ann", "ben") as (ann, ben):
        await start(ann, ben)
        await ben.connections.join(ann.invite())
        await trio.sleep(UNUSED_S)
        wanted = frozenset({ann.peer})
        assert ben.connections.circle.unused(ben.connections.introduced(), wanted) == []
        assert ann.connections.circle.unused(ann.connections.introduced(), frozenset()) == []
        monkeypatch.setattr(type(ben.session(ann)), "streams", 0)
        (unused,) = ben.connections.circle.unused(ben.connections.introduced(), frozenset())
        unused.end(circle.LET_GO)
        await trio.sleep(1)
        said = [event.text for node in (ann, ben) for event in node.events]
        assert sum("let " in text and "not needed" in text for text in said) == 2
        assert not any("lost" in text for text in said)


async def test_a_silent_session_is_not_let_go(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with parties(tmp_path, "ann", "ben") as (ann, ben):
        await start(ann, ben)
        await ben.connections.join(ann.invite())
        await trio.sleep(UNUSED_S)
        monkeypatch.setattr(type(ben.session(ann)), "streams", 0)
        switch_off(ann)
        await trio.sleep(CALM_INTERVAL_S + 2 * SUSPECT_S)
        assert ben.session(ann).suspected
        assert ben.connections.circle.unused(ben.connections.introduced(), frozenset()) == []


async def test_one_that_does_not_answer_is_made_up_for(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with many(tmp_path, monkeypatch) as nodes:
        await trio.sleep(UNUSED_S + SOON_S)
        node = nodes[1]
        for peer in {session.peer for session in node.connections.introduced()}:
            (dead,) = [one for one in nodes if one.peer == peer]
            switch_off(dead)
        await trio.sleep(RECONSIDERED_S)
        heard = [one for one in node.connections.introduced() if not one.suspected]
        assert len(heard) >= 1


async def test_a_session_in_use_is_kept(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hold(stream: object) -> None:
        await trio.sleep_forever()

    async with many(tmp_path, monkeypatch) as nodes:
        user, *others = nodes[1:]
        for node in nodes:
            node.endpoint.serve("control", hold)
        await trio.sleep(20)
        streams = [
            await user.session(one).open("control")
            for one in (nodes[0], *others)
            if user.knows(one)
        ]
        assert (held := {stream.peer for stream in streams})
        await trio.sleep(UNUSED_S + SOON_S)
        assert held <= {session.peer for session in user.connections.introduced()}


# -- whom a node needs ------------------------------------------------------------------------


async def test_who_borrows_keeps_in_touch_with_lenders(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "ann") as (ann,):
        peers = crowd(ann, 100)
        for peer in peers[50:]:
            say(ann, peer, ("serve",))
        chosen = Circle(ann.membership, lambda: ())
        assert len(chosen.wanted()) == neighbourhood.DRAWN
        chosen.borrows = True
        lenders = chosen.wanted()
        assert len(lenders & set(peers[:50])) >= MAX_LENDERS
        gone = next(iter(lenders & set(peers[:50])))
        chosen.tried(gone, well=False)
        assert len((chosen.wanted() - {gone}) & set(peers[:50])) >= MAX_LENDERS
        chosen.tried(gone, well=True)
        assert chosen.wanted() == lenders


async def test_relays_and_who_may_renew_are_kept_in_touch_with(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "ann") as (ann,):
        peers = crowd(ann, 100)
        for peer in peers[:3]:
            say(ann, peer, ("relay",))
        chosen = Circle(ann.membership, lambda: peers[10:12])
        assert len(chosen.wanted() & set(peers[:3])) >= RELAYS
        assert set(peers[10:12]) <= chosen.wanted()


async def test_a_failed_member_that_is_forgotten_is_forgotten_here_too(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "ann") as (ann,):
        peers = crowd(ann, 20)
        chosen = Circle(ann.membership, lambda: ())
        chosen.tried(peers[0], well=False)
        ann.ledger.members.roster.forget(peers[0])
        chosen.wanted()
        assert chosen._failed == {}


async def test_whoever_may_renew_a_grant_that_runs_out_is_named(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        await start(founder, ann, ben)
        await ann.connections.join(founder.invite())
        await ben.connections.join(ann.invite(mesh=founder.mesh))
        assert ben.connections.renewal.renewers() == set()
        ben.wall.ahead_s = 0.6 * GRANT_LIFETIME_S
        assert ben.connections.renewal.renewers() == {ann.peer, founder.peer}


def crowd(ann: Party, size: int) -> list[PeerId]:
    peers = [PeerId(number.to_bytes(32, "big")) for number in range(1, size + 1)]
    for peer in peers:
        grant = ann.ledger.issue_grant(ann.mesh, peer, Role.PEER)
        ann.ledger.members._shown[ann.mesh, peer] = grant
        say(ann, peer, ())
    return peers


def say(ann: Party, peer: PeerId, roles: tuple[str, ...]) -> None:
    ann.ledger.members.roster.merge(Member(peer, "one", last_seen=ann.wall(), roles=roles))
