"""Who is put out is out, everywhere and for good: nodes in a world made of memory, a fake clock."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from discovery.grants import Role
from meshnode.errors import AccessError, DiskFull, MeshError, UsageError
from meshnode.events import Kind
from meshnode.state import Home
from tests.lab.parties import (
    ON_HEARING_S,
    join,
    parties,
    recorded_messages,
    remove,
    ring,
    ring_of,
    run_all,
    world_of_parties,
)
from tunnels import Identity, TunnelError

Clock = trio.testing.MockClock


# -- spreading ------------------------------------------------------------------------------------


async def test_a_removal_is_applied_by_every_member_within_a_second(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with ring(tmp_path, "founder", "ann", "ben", "cat", "out") as nodes:
        founder, *others, out = nodes
        sessions = [node.session(out) for node in (founder, *others)]
        streams = [await out.session(node).open("control") for node in (founder, *others)]
        remove(founder, out)
        assert not founder.lets_in(out), "at once"
        await trio.sleep(ON_HEARING_S)
        for node, session in zip((founder, *others), sessions, strict=True):
            assert not node.lets_in(out), node.name
            assert session.closed.is_set(), node.name
            assert node.membership.member(out.peer) is None, node.name
        for stream in streams:
            with pytest.raises(TunnelError):
                await stream.send_all(b"still there?")
        assert all(node.knows(founder) for node in others), "nobody else is touched"


async def test_it_is_passed_on_along_members_that_the_remover_does_not_reach(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann", "ben", "out") as (founder, ann, ben, out):
        run_all(founder, ann, ben, out)
        await trio.testing.wait_all_tasks_blocked()
        await join(founder, ann, ben, out)
        for one, other in ((ann, ben), (ben, out)):
            session = await one.dial(other)
            places = one.endpoint.candidates()
            await one.connections.introductions.introduce(session, places, [founder.mesh])
        await trio.sleep(1)
        for node in (ben, out):  # both lose sight of the founder
            founder.ledger.members.roster.forget(node.peer)
            node.ledger.members.roster.forget(founder.peer)
            node.session(founder).end("the test parts them")
        await trio.sleep(1)
        assert ben.lets_in(out)
        founder.desk.answer({"op": "remove", "peer": str(out.peer)})
        await trio.sleep(ON_HEARING_S)
        assert not ben.lets_in(out), "ann told ben"


async def test_who_is_put_out_says_so_and_does_not_call_again(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with ring(tmp_path, "founder", "ann", "out") as (founder, _, out):
        remove(founder, out)
        await trio.sleep(ON_HEARING_S)
        assert "no longer a member of founder's mesh" in out.warnings()
        assert out.warnings().count("no longer a member") == 1
        assert out.membership.role_in(founder.mesh) is None
        assert out.membership.members() == ()
        with recorded_messages() as sent:
            await trio.sleep(300)
        of_out = [one for one in sent if one.service != "roster"]  # by which the others compare
        assert [one for one in of_out if one.to != out.peer] == []


async def test_who_was_away_hears_it_when_it_calls(tmp_path: Path, autojump_clock: Clock) -> None:
    async with world_of_parties() as world:
        async with ring_of(world, tmp_path, "founder", "out") as (founder, out):
            await join(founder, out)
        async with ring_of(world, tmp_path, "founder") as (founder,):
            founder.desk.answer({"op": "remove", "peer": "out"})
        async with ring_of(world, tmp_path, "founder", "out") as (founder, out):
            run_all(founder, out)
            await trio.sleep(5)
            assert "no longer a member of founder's mesh" in out.warnings()
            assert not founder.lets_in(out)


async def test_a_second_statement_heard_while_the_first_is_told_is_not_lost(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with ring(tmp_path, "founder", "ann", "one", "two") as (founder, ann, one, two):
        remove(founder, one)
        await trio.testing.wait_all_tasks_blocked()
        remove(founder, two)
        await trio.sleep(ON_HEARING_S)
        assert not ann.lets_in(one)
        assert not ann.lets_in(two)


async def test_it_counts_although_the_disk_is_full_and_is_written_later(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_name: str, _document: object) -> None:
        raise DiskFull("no space left")

    async with ring(tmp_path, "founder", "ann", "out") as (founder, ann, out):
        with monkeypatch.context() as full_disk:
            full_disk.setattr(ann.home, "save_json", refuse)
            remove(founder, out)
            await trio.sleep(ON_HEARING_S)
            assert not ann.lets_in(out)
            assert not (ann.home.folder / "revocations.json").exists()
        await trio.sleep(5)
        assert out.peer.key.hex() in (ann.home.folder / "revocations.json").read_text()


# -- chains ---------------------------------------------------------------------------------------


async def test_a_revoked_inviters_later_grants_are_void_and_earlier_members_stay(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    names = ("founder", "inviter", "early", "late")
    async with parties(tmp_path, *names) as (founder, inviter, early, late):
        run_all(founder, inviter, early, late)
        await trio.testing.wait_all_tasks_blocked()
        await join(founder, inviter)
        await early.connections.join(inviter.invite(mesh=founder.mesh))
        await early.dial(founder)
        places = early.endpoint.candidates()
        await early.connections.introductions.introduce(
            early.session(founder), places, [founder.mesh]
        )
        token = inviter.invite(mesh=founder.mesh)
        answer = founder.desk.answer({"op": "remove", "peer": "inviter"})
        assert answer["stay"] == ["early"]
        # The revoked one goes on as if nothing had been said.
        inviter.ledger.revocations.__init__()  # type: ignore[misc]
        forged = inviter.ledger.issue_grant(founder.mesh, late.peer, Role.PEER)
        late.ledger.keep_grant(forged)
        session = await late.dial(founder)
        with pytest.raises(AccessError, match="removed"):
            await late.connections.introductions.introduce(
                session, late.endpoint.candidates(), [founder.mesh]
            )
        assert not founder.lets_in(late)
        await trio.sleep(ON_HEARING_S)
        assert founder.lets_in(early)
        with pytest.raises(MeshError):
            await late.connections.join(token)
        # The spared one gets a grant that does not hang on the revoked one any more.
        await trio.sleep(120)
        grant = early.ledger.grant(founder.mesh)
        assert grant is not None
        assert [link.peer for link in grant.chain()] == [founder.peer, early.peer]
        assert founder.lets_in(early)


async def test_a_removed_peer_comes_back_by_a_new_invite_and_not_by_its_old_one(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "out") as (founder, out):
        run_all(founder, out)
        await trio.testing.wait_all_tasks_blocked()
        old = founder.invite()
        unused = founder.invite()
        await out.connections.join(old)
        remove(founder, out)
        await trio.sleep(ON_HEARING_S)
        with pytest.raises(AccessError, match="withdrawn"):
            await out.connections.join(old)
        with pytest.raises(AccessError, match="removed from the mesh after the invite"):
            await out.connections.join(unused)
        await join(founder, out)
        assert founder.lets_in(out)
        assert out.membership.role_in(founder.mesh) is Role.PEER


async def test_only_who_stands_above_a_member_may_put_it_out(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with ring(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        with pytest.raises(AccessError, match="only founder may remove ben"):
            remove(ann, ben)
        with pytest.raises(AccessError, match="may remove founder"):
            remove(ann, founder)
        with pytest.raises(UsageError, match="mesh leave"):
            ann.desk.answer({"op": "remove", "peer": "ann"})
        with pytest.raises(UsageError, match="no member 'nobody'"):
            ann.desk.answer({"op": "remove", "peer": "nobody"})
        await trio.sleep(ON_HEARING_S)
        assert founder.lets_in(ben)


async def test_two_members_of_one_name_are_told_apart_by_their_ids(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with ring(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        ben.membership.name = "ann"
        await ben.introduce_to(founder)
        with pytest.raises(UsageError, match=f"{ann.peer}|{ben.peer}"):
            founder.desk.answer({"op": "remove", "peer": "ann"})
        founder.desk.answer({"op": "remove", "peer": ben.peer.short})
        assert founder.lets_in(ann)
        assert not founder.lets_in(ben)


# -- leaving --------------------------------------------------------------------------------------


async def test_who_leaves_is_gone_everywhere_and_may_come_back_by_the_same_invite(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with ring(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        token = founder.invite()
        answer = ann.desk.answer({"op": "leave"})
        assert answer["told"] == 2
        await trio.sleep(ON_HEARING_S)
        for node in (founder, ben):
            assert not node.lets_in(ann), node.name
            assert node.membership.member(ann.peer) is None
        assert ann.membership.members() == ()
        with pytest.raises(AccessError, match="founder cannot leave"):
            ann.desk.answer({"op": "leave"})
        await ann.connections.join(token)
        assert founder.lets_in(ann)


async def test_who_left_while_its_node_was_off_tells_whoever_calls(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with world_of_parties() as world:
        async with ring_of(world, tmp_path, "founder", "ann") as (founder, ann):
            await join(founder, ann)
        async with ring_of(world, tmp_path, "ann") as (ann,):
            assert ann.desk.answer({"op": "leave"})["told"] == 0
        async with ring_of(world, tmp_path, "founder", "ann") as (founder, ann):
            run_all(founder, ann)
            await trio.sleep(10)
            assert founder.membership.member(ann.peer) is None


# -- expiry and clocks ----------------------------------------------------------------------------


async def test_a_membership_that_runs_out_ends_its_sessions(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with ring(tmp_path, "founder", "ann") as (founder, ann):
        session = founder.session(ann)
        grant = ann.ledger.grant(founder.mesh)
        assert grant is not None
        founder.wall.ahead_s = grant.expires_at - founder.ledger.now() - 10
        await trio.sleep(5)
        assert founder.lets_in(ann)
        await trio.sleep(10)
        assert session.close_reason == "the membership has expired"
        assert not founder.lets_in(ann)


async def test_a_clock_that_steps_back_ends_nothing(tmp_path: Path, autojump_clock: Clock) -> None:
    async with ring(tmp_path, "founder", "ann") as (founder, ann):
        founder.wall.ahead_s = -3600
        ann.wall.ahead_s = 3600
        await trio.sleep(30)
        assert founder.lets_in(ann)
        assert ann.lets_in(founder)


# -- several meshes -------------------------------------------------------------------------------


async def test_two_meshes_know_nothing_of_each_other(tmp_path: Path, autojump_clock: Clock) -> None:
    names = ("one", "two", "both", "red", "blue")
    async with parties(tmp_path, *names) as (one, two, both, red, blue):
        run_all(one, two, both, red, blue)
        await trio.testing.wait_all_tasks_blocked()
        with recorded_messages() as sent:
            await join(one, both, red)
            await join(two, both, blue)
            await trio.sleep(5)
            one.desk.answer({"op": "remove", "peer": "red"})
            await trio.sleep(ON_HEARING_S)
            for node in (one, two):
                node.session(both).end("the test parts them")
            await trio.sleep(60)
        assert both.knows(one)
        assert both.knows(two)
        secret_of_one = (one.mesh, one.peer.key, red.peer.key)
        secret_of_two = (two.mesh, two.peer.key, blue.peer.key)
        for hearer, secrets in (
            *((node, secret_of_two) for node in (one, red)),
            *((node, secret_of_one) for node in (two, blue)),
        ):
            told = [message for message in sent if message.to == hearer.peer]
            assert told
            for message in told:
                assert not any(message.mentions(key) for key in secrets), (hearer.name, message)


async def test_a_removal_in_one_mesh_leaves_the_other_alone(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "one", "two") as (one, two):
        run_all(one, two)
        await trio.testing.wait_all_tasks_blocked()
        await join(one, two)
        await join(two, one)
        await trio.sleep(1)
        with pytest.raises(UsageError, match="several meshes"):
            one.desk.answer({"op": "remove", "peer": "two"})
        one.desk.answer({"op": "remove", "peer": "two", "mesh": "own"})
        await trio.sleep(30)  # the session ended, and they met again by the other mesh
        assert one.knows(two)
        assert two.knows(one)
        assert set(one.membership.shown_by(two.peer)) == {two.mesh}


def test_a_removal_at_a_home_where_no_node_runs_is_kept(tmp_path: Path) -> None:
    from meshnode.administration import Administration
    from meshnode.joining import Joining
    from meshnode.membership import Membership

    someone = Identity.generate().peer
    for _ in range(2):
        with Home(tmp_path / "home") as home:
            members = Membership(home, home.identity("node.key"), "home")
            desk = Administration(members, Joining(members.ledger), lambda: ())
            if not members.ledger.revocations.of_mesh(members.ledger.own_mesh):
                desk.answer({"op": "remove", "peer": str(someone)})
    assert len(members.ledger.revocations.of_mesh(members.ledger.own_mesh)) == 1


async def test_the_other_members_are_told_who_went(tmp_path: Path, autojump_clock: Clock) -> None:
    async with ring(tmp_path, "founder", "ann", "out") as (founder, ann, out):
        remove(founder, out)
        await trio.sleep(ON_HEARING_S)
        told = [event.text for event in ann.events if event.kind is Kind.PEER]
        assert f"out ({out.peer.short}) is no longer a member of founder's mesh" in told
