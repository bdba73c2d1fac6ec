"""Nodes find, keep and lose one another: real tunnels and memberships in a world made of memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio
import trio.testing

from discovery.grants import Role, issue_root, parse_grant_untrusted
from discovery.roster import MEMBER_LIFETIME_S
from meshnode import membership
from meshnode.errors import AccessError, NetworkError
from meshnode.membership import Membership
from meshnode.messages import MessageStream
from meshnode.state import Home
from meshnode.strangers import STRANGER_TIMEOUT_S
from tests.lab.parties import (
    Party,
    Sent,
    parties,
    party,
    recorded_messages,
    world_of_parties,
)
from tunnels import Endpoint, Identity, Stream, StreamReset

Clock = trio.testing.MockClock


async def test_an_introduction_that_fails_on_a_living_session_is_tried_again(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "alice", "bob") as (alice, bob):
        await alice.connections.join(bob.invite())
        alice.session(bob).end("the test parts them")
        await trio.sleep(1)
        dropped: list[Stream] = []

        async def hello(stream: Stream) -> None:
            if not dropped:
                dropped.append(stream)
                stream.reset("lost on the way")
            else:
                await bob.connections.introductions.serve(stream, bob.endpoint.candidates())

        bob.endpoint.serve("hello", hello)
        alice.run_connections()
        await trio.sleep(10)
        assert dropped
        assert alice.knows(bob)
        assert bob.knows(alice)


async def test_a_peer_that_hangs_up_at_once_is_dialled_ever_less_often(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "alice", "bob") as (alice, bob):
        await alice.connections.join(bob.invite())
        alice.session(bob).end("the test parts them")
        await trio.sleep(1)
        calls: list[float] = []

        async def hello(stream: Stream) -> None:
            await bob.connections.introductions.serve(stream, bob.endpoint.candidates())
            calls.append(trio.current_time())
            bob.session(alice).end("not now")

        bob.endpoint.serve("hello", hello)
        alice.run_connections()
        await trio.sleep(60)
        assert 4 <= len(calls) <= 7, calls


async def test_a_stranger_loses_its_session_and_a_member_keeps_it(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "alice", "bob", "stranger") as (alice, bob, stranger):
        bob.run_connections()
        await trio.testing.wait_all_tasks_blocked()
        await alice.connections.join(bob.invite())
        session = await stranger.dial(bob)
        await trio.sleep(STRANGER_TIMEOUT_S + 1)
        assert session.close_reason == "no introduction within 30 s"
        assert bob.endpoint.sessions() == [bob.session(alice)]
        assert bob.knows(alice)


async def test_many_strangers_do_not_lock_members_out(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshnode.strangers.MAX_STRANGERS", 2)
    async with parties(tmp_path, "bob", "alice", "s1", "s2", "s3") as (bob, alice, *strangers):
        bob.run_connections()
        await trio.testing.wait_all_tasks_blocked()
        await alice.connections.join(bob.invite())
        sessions = [await stranger.dial(bob) for stranger in strangers]
        await trio.sleep(1)
        assert [session.closed.is_set() for session in sessions] == [True, False, False]
        assert bob.knows(alice)


@pytest.mark.parametrize("service", ["join", "hello"])
async def test_whoever_says_nothing_is_not_waited_for(
    service: str, tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "alice", "bob") as (alice, bob):
        session = await alice.dial(bob)
        stream = await session.open(service)
        await stream.send_all(b"\0")
        with trio.fail_after(membership.HELLO_TIMEOUT_S + 1):
            with pytest.raises(StreamReset, match="nothing was said"):
                await stream.receive_some()


@pytest.mark.parametrize("service", ["join", "hello"])
async def test_nonsense_from_a_stranger_leaves_one_line_in_the_log(
    service: str, tmp_path: Path, autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with parties(tmp_path, "alice", "bob") as (alice, bob):
        stream = await (await alice.dial(bob)).open(service)
        await MessageStream(stream).send({"id": 7, "grants": 7})
        with pytest.raises(StreamReset, match="unknown shape"):
            await stream.receive_some()
        assert "Traceback" not in caplog.text


def meshes_shown(sent: list[Sent], to: Party) -> set[bytes]:
    """The meshes whose grants were shown to this node."""
    hellos = [one.message for one in sent if one.to == to.peer and one.service == "hello"]
    grants = [data for hello in hellos for data in hello.get("grants", ())]
    return {parse_grant_untrusted(data).mesh for data in grants}


async def test_only_grants_of_shared_meshes_are_shown(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "alice", "bob") as (alice, bob):
        for _ in range(20):
            root = Identity.generate()
            alice.membership.ledger._grants[root.peer.key] = issue_root(
                root.sign,
                mesh=root.peer.key,
                peer=alice.peer,
                role=Role.PEER,
                issued_at=int(time.time()),
                may_invite=False,
            )
        with recorded_messages() as sent:
            await alice.connections.join(bob.invite())
        assert meshes_shown(sent, bob) == {bob.mesh}
    async with parties(tmp_path, "alice", "bob") as (alice, bob):  # what was proven is kept
        with recorded_messages() as sent:
            await alice.meet(bob)
            await trio.sleep(1)
        assert meshes_shown(sent, bob) == {bob.mesh}
        assert bob.knows(alice)


@pytest.mark.parametrize("introduced", [True, False], ids=["introduced", "killed before that"])
async def test_a_member_that_is_started_before_its_inviter_waits_for_it(
    tmp_path: Path, autojump_clock: Clock, introduced: bool
) -> None:
    async with parties(tmp_path, "alice", "bob") as (alice, bob):
        token = bob.invite()
        if introduced:
            await alice.connections.join(token)
        else:
            await alice.connections.joining.redeem(await alice.dial(bob), token)
    async with (
        world_of_parties() as world,
        party(tmp_path, world.host("11.0.0.1"), "alice") as alice,
    ):
        alice.nursery.start_soon(alice.connections.run, (token,))
        with trio.fail_after(60):
            await alice.connections.settled.wait()
        assert "already: it goes on, and tries again" in alice.warnings()
        async with party(tmp_path, world.host("11.0.0.2"), "bob") as bob:
            bob.run_connections()
            await trio.sleep(60)
            assert alice.knows(bob)
            assert bob.knows(alice)


async def test_whoever_is_no_member_yet_is_told_at_once_that_its_inviter_is_away(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "bob") as (bob,):
        token = bob.invite()
    async with parties(tmp_path, "alice") as (alice,):
        with pytest.RaisesGroup(NetworkError, flatten_subgroups=True):
            await alice.connections.run((token,))


async def test_a_worker_becomes_a_peer_by_another_invite(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "alice", "bob") as (alice, bob):
        await alice.connections.join(bob.invite(Role.WORKER))
        assert bob.membership.roles(alice.peer) == {Role.WORKER}
        assert not bob.membership.authorize(alice.peer, "control")
        await alice.connections.join(bob.invite(Role.PEER))
        assert bob.membership.roles(alice.peer) == {Role.PEER}
        assert bob.membership.authorize(alice.peer, "control")


async def test_both_sides_are_told_once_that_they_are_connected(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "alice", "bob") as (alice, bob):
        for one in (alice, bob):
            one.run_connections()
        await trio.testing.wait_all_tasks_blocked()
        await alice.connections.join(bob.invite())
        await trio.sleep(5)
        assert alice.tells() == [("bob", True)]
        assert bob.tells() == [("alice", True)]
        alice.session(bob).end("the test parts them")
        await trio.sleep(0.5)
        assert bob.tells() == [("alice", True), ("alice", False)]


async def test_a_peer_that_restarted_must_introduce_itself_again(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "alice", "bob", "spare") as (alice, bob, spare):
        await alice.connections.join(bob.invite())
        assert bob.membership.authorize(alice.peer, "control")
        restarted = Endpoint(
            alice.endpoint.identity,
            authorize=alice.membership.authorize,
            network=spare.endpoint._network,
        )
        await spare.nursery.start(restarted.run, None, 5544)
        await restarted.connect(bob.peer, bob.endpoint.candidates())
        assert not bob.knows(alice)
        assert not bob.membership.roles(alice.peer)
        assert not bob.membership.authorize(alice.peer, "control")
        await alice.connections.introductions.introduce(
            restarted.sessions()[0], restarted.candidates(), (bob.mesh,)
        )
        await trio.sleep(1)
        assert bob.membership.authorize(alice.peer, "control")


async def test_hearing_the_same_again_writes_nothing(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with parties(tmp_path, "alice", "bob") as (alice, bob):
        token = bob.invite()
        await alice.connections.join(token)
        written: list[str] = []
        monkeypatch.setattr(Home, "save_json", lambda _home, name, _doc: written.append(name))
        await alice.introduce_to(bob)
        assert written == []
        await alice.connections.joining.redeem(alice.session(bob), token)  # burned already
        assert written == ["membership.json"], "alice's new grant, and nothing of bob's"


async def test_a_peers_words_cannot_drive_our_terminal(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async def refuse(stream: Stream) -> None:
        await MessageStream(stream).send({"refused": "\x1b[2Jgo away"})

    async with parties(tmp_path, "alice", "bob") as (alice, bob):
        bob.endpoint.serve("join", refuse)
        with pytest.raises(AccessError, match=r"refused: \?\[2Jgo away"):
            await alice.connections.join(bob.invite())


async def test_members_unheard_of_are_dropped_and_those_here_are_not(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "bob", "alice", "gone", "new") as (bob, alice, gone, new):
        await alice.connections.join(bob.invite())
        await gone.connections.join(bob.invite())
        gone.session(bob).end("for good")
        await trio.sleep(1)
        for one in (bob, new):
            one.wall.ahead_s = MEMBER_LIFETIME_S + 1000
        await new.connections.join(bob.invite())
        assert {member.name for member in bob.membership.members()} == {"alice", "new"}
    with Home(tmp_path / "alice") as home:
        identity = Identity.load_or_create(home.folder / "node.key")
        later_s = time.time() + MEMBER_LIFETIME_S + 1000
        members = Membership(home, identity, "alice", lambda: later_s).members()
        assert members == (), "at the next start, too"
