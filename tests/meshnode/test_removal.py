"""Who is put out is out, everywhere and for good: nodes in a world made of memory, a fake clock."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from discovery import revocations
from discovery.grants import Role
from discovery.revocations import REMEMBERED_S, Revocation, encode_revocation, revoke_peer
from meshnode import membership
from meshnode.errors import AccessError, DiskFull, MeshError, UsageError
from meshnode.events import Kind
from meshnode.messages import MessageStream
from meshnode.state import Home
from tests.lab.datagrams import World
from tests.lab.parties import Party, parties, party, recorded_messages, world_of_parties
from tunnels import Identity, Stream, TunnelError

Clock = trio.testing.MockClock
ON_HEARING_S = 1.0


async def echo(stream: Stream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


def run_all(*nodes: Party) -> None:
    for node in nodes:
        node.endpoint.serve("control", echo)
        node.run_connections()


async def join(inviter: Party, *joiners: Party, role: Role = Role.PEER) -> None:
    for joiner in joiners:
        await joiner.connections.join(inviter.invite(role))


def remove(remover: Party, removed: Party) -> None:
    remover.desk.answer({"op": "remove", "peer": str(removed.peer)})


@asynccontextmanager
async def ring(folder: Path, *names: str) -> AsyncIterator[list[Party]]:
    """A founder and members of its mesh, all connected with all, all running."""
    async with parties(folder, *names) as nodes:
        founder, *members = nodes
        run_all(*nodes)
        await trio.testing.wait_all_tasks_blocked()
        await join(founder, *members)
        for n, one in enumerate(members):
            for other in members[n + 1 :]:
                session = await one.dial(other)
                places = one.endpoint.candidates()
                await one.connections.introductions.introduce(session, places, [founder.mesh])
        await trio.sleep(1)
        yield nodes


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
            founder.ledger.roster.forget(node.peer)
            node.ledger.roster.forget(founder.peer)
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
        assert [one for one in sent if one.to != out.peer] == []


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


@asynccontextmanager
async def ring_of(world: World, folder: Path, *names: str) -> AsyncIterator[list[Party]]:
    """Nodes, each at the address that goes with its name."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                party(folder, world.host(f"11.0.0.{sum(name.encode()) % 250 + 1}"), name)
            )
            for name in names
        ]


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


async def test_a_peer_that_passes_on_what_nobody_said_is_not_heard_out(
    tmp_path: Path,
    autojump_clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each signature costs a fraction of a millisecond, and a page holds a hundred."""
    looked_at: list[Revocation] = []
    verify = revocations.verify_revocation

    def count(one: Revocation) -> None:
        looked_at.append(one)
        verify(one)

    async with ring(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        said = revoke_peer(
            ann.ledger.identity.sign,
            mesh=founder.mesh,
            peer=ben.peer,
            issuer=ann.peer,
            at=int(ann.ledger.now()),
            grant=ann.ledger.grant(founder.mesh),
        )
        later = [said.at + n for n in range(1, 100)]
        forged = [replace(said, at=at, until=at + REMEMBERED_S) for at in later]
        monkeypatch.setattr(revocations, "verify_revocation", count)
        caplog.clear()
        assert not await ann.connections.removal.tell(ann.session(founder), [said, *forged])
        assert looked_at[:2] == [said, forged[0]]
        assert forged[1] not in looked_at
        assert len(caplog.records) < 10
        assert founder.ledger.revocations.knows(said)
        assert founder.lets_in(ben), "ann does not stand above ben"


async def test_a_peer_that_makes_work_of_the_truth_is_heard_slowly(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says the same of one member again and again, each time a moment later: each is news."""
    async with ring(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        pages: list[object] = []
        take = founder.membership.take

        def count(said: list[Revocation]) -> None:
            pages.append(said)
            take(said)

        async def pour(stream: Stream) -> None:
            messages = MessageStream(stream)
            for at in range(int(ann.ledger.now()), int(ann.ledger.now()) + 1000):
                said = revoke_peer(
                    ann.ledger.identity.sign,
                    mesh=founder.mesh,
                    peer=ben.peer,
                    issuer=ann.peer,
                    at=at,
                    grant=ann.ledger.grant(founder.mesh),
                )
                page = [encode_revocation(said)]
                await messages.send({"revocations": page, "more": True})

        monkeypatch.setattr(founder.membership, "take", count)
        monkeypatch.setattr(membership, "thread_time", itertools.count(step=0.1).__next__)
        with trio.move_on_after(60):
            while True:
                with contextlib.suppress(TunnelError):
                    async with await ann.session(founder).open("revocations") as stream:
                        await pour(stream)
        assert 10 <= len(pages) < 50, "a second's worth, and then three hundredths of each"
        assert founder.knows(ann)


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


async def test_who_takes_another_ones_id_for_a_name_protects_nobody(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with ring(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        for one, other in ((ann, ben), (ben, ann)):
            one.membership.name = str(other.peer)
            await one.introduce_to(founder)
        founder.membership.name = str(ben.peer)
        answer = founder.desk.answer({"op": "remove", "peer": str(ben.peer)})
        assert answer["peer"] == str(ben.peer)
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


async def test_what_was_opened_by_a_grant_ends_with_it_whatever_was_shown_since(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removed peer shows its place in another mesh alone, where it may open nothing."""
    async with parties(tmp_path, "lender", "other", "out") as (lender, other, out):
        run_all(lender, other, out)
        await trio.testing.wait_all_tasks_blocked()
        await join(lender, out)
        await join(other, out, role=Role.CLIENT)
        await join(other, lender)
        await trio.sleep(60)
        await out.introduce_to(lender)
        assert set(lender.membership.shown_by(out.peer)) == {lender.mesh, other.mesh}
        session = lender.session(out)
        stream = await out.session(lender).open("control")
        await stream.send_all(b"a lease")
        assert await stream.receive_some(7) == b"a lease"
        monkeypatch.setattr(out.ledger, "proven", lambda _peer: frozenset({other.mesh}))
        await out.introduce_to(lender)
        lender.desk.answer({"op": "remove", "peer": str(out.peer), "mesh": "own"})
        await trio.sleep(ON_HEARING_S)
        assert session.closed.is_set()
        with pytest.raises(TunnelError):
            await stream.send_all(b"still there?")


# -- old disks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("restored", ["out", "ann", "founder"])
async def test_nothing_is_undone_by_an_old_disk(
    restored: str, tmp_path: Path, autojump_clock: Clock
) -> None:
    names = ("founder", "ann", "out")
    async with world_of_parties() as world:
        async with ring_of(world, tmp_path, *names) as nodes:
            founder, ann, out = nodes
            run_all(*nodes)
            await trio.testing.wait_all_tasks_blocked()
            await join(founder, ann, out)
            session = await ann.dial(out)
            await ann.connections.introductions.introduce(
                session, ann.endpoint.candidates(), [founder.mesh]
            )
            await trio.sleep(1)
            set_back = {restored, "out"}  # the removed one is hostile in any case
            for name in set_back:
                shutil.copytree(tmp_path / name, tmp_path / f"{name}.copy")
            remove(founder, out)
            await trio.sleep(ON_HEARING_S)
            assert not ann.lets_in(out)
        for name in set_back:
            shutil.rmtree(tmp_path / name)
            (tmp_path / f"{name}.copy").rename(tmp_path / name)
        async with ring_of(world, tmp_path, *names) as nodes:
            founder, ann, out = nodes
            run_all(founder, ann)
            await trio.sleep(10)
            assert founder.knows(ann)
            run_all(out)
            await trio.sleep(10)
            for node in (founder, ann):
                assert not node.lets_in(out), node.name
                assert node.membership.member(out.peer) is None, node.name


async def test_a_founder_from_an_old_disk_hears_its_own_word_before_the_removed_gets_far(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    """The removed peer comes first: it is let in until any other member connects."""
    names = ("founder", "ann", "out")
    async with world_of_parties() as world:
        async with ring_of(world, tmp_path, *names) as (founder, ann, out):
            run_all(founder, ann, out)
            await trio.testing.wait_all_tasks_blocked()
            await join(founder, ann, out)
            for one in ("founder", "out"):
                shutil.copytree(tmp_path / one, tmp_path / f"{one}.copy")
            remove(founder, out)
            await trio.sleep(ON_HEARING_S)
        for one in ("founder", "out"):
            shutil.rmtree(tmp_path / one)
            (tmp_path / f"{one}.copy").rename(tmp_path / one)
        async with ring_of(world, tmp_path, "founder", "out") as (founder, out):
            run_all(founder, out)
            await trio.sleep(10)
            assert founder.lets_in(out), "nobody was there to tell it"
            async with ring_of(world, tmp_path, "ann") as (ann,):
                run_all(ann)
                await trio.sleep(60)
                assert ann.knows(founder)
                assert not founder.lets_in(out)
                assert founder.endpoint.session(out.peer) is None


async def test_an_old_invite_at_an_inviter_from_an_old_disk_brings_nobody_back(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    """The removed peer has its old invite honoured before any other member connects."""
    async with world_of_parties() as world:
        async with ring_of(world, tmp_path, "founder", "ann", "out") as (founder, ann, out):
            run_all(founder, ann, out)
            await trio.testing.wait_all_tasks_blocked()
            await join(founder, ann, out)
            token = founder.invite()
            shutil.copytree(tmp_path / "founder", tmp_path / "copy")
            await trio.sleep(60)
            remove(founder, out)
            await trio.sleep(60)
            assert out.membership.role_in(founder.mesh) is None
        shutil.rmtree(tmp_path / "founder")
        (tmp_path / "copy").rename(tmp_path / "founder")
        for known in ("membership.json", "revocations.json"):  # it keeps to itself what it heard
            (tmp_path / "out" / known).unlink()
        async with ring_of(world, tmp_path, "founder", "out") as (founder, out):
            run_all(founder, out)
            await out.connections.join(token)
            async with ring_of(world, tmp_path, "ann") as (ann,):
                run_all(ann)
                await trio.sleep(60)
                assert ann.knows(founder)
                assert not founder.lets_in(out)
                assert not ann.lets_in(out)


async def test_an_invite_withdrawn_stays_so_after_its_inviter_was_set_back(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with world_of_parties() as world:
        async with ring_of(world, tmp_path, "founder", "ann") as (founder, ann):
            run_all(founder, ann)
            await trio.testing.wait_all_tasks_blocked()
            await join(founder, ann)
            token = founder.invite()
            shutil.copytree(tmp_path / "founder", tmp_path / "copy")
            row = founder.desk.answer({"op": "revoke", "id": token.id.hex()[:6]})
            assert row["state"] == "withdrawn"
            await trio.sleep(ON_HEARING_S)
        shutil.rmtree(tmp_path / "founder")
        (tmp_path / "copy").rename(tmp_path / "founder")
        async with ring_of(world, tmp_path, "founder", "ann", "new") as (founder, ann, new):
            run_all(founder, ann)
            await trio.sleep(10)
            assert founder.knows(ann)
            with pytest.raises(AccessError, match="withdrawn"):
                await new.connections.join(token)


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
