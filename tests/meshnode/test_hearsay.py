"""Whoever joins by one token finds all who are there, and nobody who is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cbor2
import pytest
import trio
import trio.testing

from discovery.digest import CELLS, pack_bits, pack_entries
from discovery.grants import Role
from discovery.roster import Member
from meshnode.hearsay import SAVE_EVERY_S
from meshnode.introduction import MAX_RECORDS, record_pages
from meshnode.member_book import MAX_HEARD_OF_ONE
from meshnode.messages import Message, MessageStream
from tests.lab.homes import copy_home
from tests.lab.parties import Party, parties, recorded_messages, ring_of, world_of_parties
from tunnels import Candidate, Identity, StreamReset

Clock = trio.testing.MockClock
SOON_S = 40


def seq_now(node: Party) -> int:
    return int(node.ledger.now() * 1000)


async def start(*nodes: Party) -> None:
    for node in nodes:
        node.run_connections()
    await trio.testing.wait_all_tasks_blocked()


async def test_by_one_token_all_members_find_each_other(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    names = ("founder", "one", "two", "late")
    async with parties(tmp_path, *names) as (founder, one, two, late):
        await start(founder, one, two, late)
        for worker in (one, two):
            await worker.connections.join(founder.invite(Role.WORKER))
        await late.connections.join(founder.invite())
        await trio.sleep(SOON_S)
        for worker in (one, two):
            assert late.knows(worker)
            assert late.membership.roles(worker.peer) == {Role.WORKER}
            assert worker.lets_in(late)
        assert one.knows(two)


async def test_the_same_is_not_told_again(tmp_path: Path, autojump_clock: Clock) -> None:
    async with parties(tmp_path, "founder", "one", "two") as (founder, one, two):
        await start(founder, one, two)
        for worker in (one, two):
            await worker.connections.join(founder.invite())
        await trio.sleep(SOON_S)
        with recorded_messages() as sent:
            await trio.sleep(600)
        assert sent, "now and then two compare what they know"
        for message in sent:
            assert message.service == "roster"
            assert set(message.message) in ({"mesh", "root"}, {"cells"})
            assert message.message.get("cells", b"") == b"", "and find no difference"


async def test_who_is_removed_is_told_of_no_more(tmp_path: Path, autojump_clock: Clock) -> None:
    async with parties(tmp_path, "founder", "one", "out", "late") as (founder, one, out, late):
        await start(founder, one, out, late)
        for node in (one, out):
            await node.connections.join(founder.invite())
        await trio.sleep(SOON_S)
        founder.desk.answer({"op": "remove", "peer": "out"})
        await late.connections.join(founder.invite())
        await trio.sleep(SOON_S)
        assert late.knows(one)
        assert late.membership.member(out.peer) is None


async def test_nobody_is_made_up_or_moved(tmp_path: Path, autojump_clock: Clock) -> None:
    """A member tells of one that nobody signed for, and of another under its own address."""
    async with parties(tmp_path, "founder", "liar", "ann") as (founder, liar, ann):
        await start(founder)
        await ann.connections.join(founder.invite())
        await liar.connections.join(founder.invite())
        ghost = Identity.generate()
        here = (Candidate("quic", "11.0.0.2", 4433),)
        seq = 2**50
        unsigned = Member(ghost.peer, "ghost", here, seq=seq)
        made_up = (unsigned.signed(ghost.sign), liar.ledger.grant(founder.mesh))
        known = founder.membership.member(ann.peer)
        assert known is not None
        moved = replace(known, candidates=here, seq=seq)
        grant = founder.ledger.members.shown(founder.mesh, ann.peer)
        assert grant is not None
        assert made_up[1] is not None
        elsewhere = (
            unsigned.signed(ghost.sign),
            liar.ledger.issue_grant(liar.mesh, ghost.peer, Role.PEER),
        )
        async with await liar.session(founder).open("roster") as stream:
            messages = MessageStream(stream)
            for page in record_pages([(moved, grant), (made_up[0], made_up[1]), elsewhere]):
                await messages.send(page)
            await stream.send_eof()
            assert await messages.receive_or_end_untrusted() is None
        assert founder.membership.member(ghost.peer) is None
        assert founder.membership.member(ann.peer) == known


async def test_what_is_known_already_costs_no_signature_and_no_write(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with parties(tmp_path, "founder", "one", "two") as (founder, one, two):
        await start(founder, one, two)
        for worker in (one, two):
            await worker.connections.join(founder.invite())
        await trio.sleep(SOON_S)
        word = founder.membership.member(two.peer)
        grant = founder.ledger.members.shown(founder.mesh, two.peer)
        assert word is not None
        assert grant is not None
        checked: list[object] = []

        def look_at(member: Member) -> bool:
            checked.append(member)
            return True

        monkeypatch.setattr(Member, "is_signed", look_at)
        monkeypatch.setattr(founder.home, "save_json", checked.append)
        async with await one.session(founder).open("roster") as stream:
            messages = MessageStream(stream)
            for page in record_pages([(word, grant)] * 100):
                await messages.send(page)
            await stream.send_eof()
            assert await messages.receive_or_end_untrusted() is None
        assert checked == []


async def test_a_page_of_news_is_one_write(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with parties(tmp_path, "founder", "one") as (founder, one):
        await start(founder, one)
        await one.connections.join(founder.invite())
        await trio.sleep(SOON_S)
        news = []
        for n in range(MAX_RECORDS):
            new = Identity.generate()
            grant = founder.ledger.issue_grant(founder.mesh, new.peer, Role.WORKER)
            news.append((Member(new.peer, f"new{n}", seq=seq_now(founder)).signed(new.sign), grant))
        writes: list[str] = []
        await trio.sleep(2 * SAVE_EVERY_S)
        monkeypatch.setattr(founder.home, "save_json", lambda name, _: writes.append(name))
        async with await one.session(founder).open("roster") as stream:
            messages = MessageStream(stream)
            (page,) = record_pages(news)
            await messages.send(page)
            await stream.send_eof()
            assert await messages.receive_or_end_untrusted() is None
        assert writes == ["membership.json"]
        await trio.sleep(2 * SAVE_EVERY_S)
        assert writes == ["membership.json"]
        assert all(founder.membership.member(word.peer) for word, _ in news)


async def test_members_that_one_inviter_makes_up_are_few(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    """Each that is known is dialled, at whatever addresses it signed for."""
    async with parties(tmp_path, "founder", "ann") as (founder, ann):
        await start(founder, ann)
        await ann.connections.join(founder.invite())
        news = []
        for n in range(MAX_HEARD_OF_ONE + 2):
            ghost = Identity.generate()
            grant = ann.ledger.issue_grant(founder.mesh, ghost.peer, Role.WORKER)
            news.append(
                (Member(ghost.peer, f"ghost{n}", seq=seq_now(founder)).signed(ghost.sign), grant)
            )
        async with await ann.session(founder).open("roster") as stream:
            messages = MessageStream(stream)
            for page in record_pages(news):
                await messages.send(page)
            await stream.send_eof()
            assert await messages.receive_or_end_untrusted() is None
        known = [word for word, _ in news if founder.membership.member(word.peer)]
        assert len(known) == MAX_HEARD_OF_ONE
        assert founder.knows(ann)


# -- what is gossiped that should not be ----------------------------------------------------------


async def say(teller: Party, listener: Party, *sayings: Message) -> list[object]:
    """What is answered to these, up to the end; a refusal ends it too."""
    answers: list[object] = []
    async with await teller.session(listener).open("roster") as stream:
        messages = MessageStream(stream)
        try:
            for saying in sayings:
                await messages.send(saying)
            await stream.send_eof()
            while (answer := await messages.receive_or_end_untrusted()) is not None:
                answers.append(answer)
        except StreamReset as refusal:
            answers.append(str(refusal))
    return answers


async def test_of_a_mesh_that_is_not_shared_nothing_is_said(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann", "other") as (founder, ann, other):
        await start(founder, ann, other)
        await ann.connections.join(founder.invite())
        await founder.connections.join(other.invite())
        await trio.sleep(SOON_S)
        everything = {"of": pack_bits(range(CELLS)), "entries": b""}
        for mesh in (other.mesh, ann.mesh, b"", None):
            (answer,) = await say(ann, founder, {"mesh": mesh, "root": bytes(16)}, everything)
            assert "does not share" in str(answer)
        _, second, *pages = await say(
            ann, founder, {"mesh": founder.mesh, "root": bytes(16)}, everything
        )
        assert isinstance(second, dict)
        assert second["pages"] == len(pages) == 1
        assert other.peer.key not in cbor2.dumps(pages)


async def test_talk_that_is_none_ends_its_stream_and_nothing_else(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann") as (founder, ann):
        await start(founder, ann)
        await ann.connections.join(founder.invite())
        root: Message = {"mesh": founder.mesh, "root": bytes(16)}
        sayings: tuple[list[Message], ...] = (
            [{"mesh": founder.mesh}],
            [{"mesh": founder.mesh, "news": b"7"}],
            [root, {"of": b"", "entries": b""}],
            [root, {"of": bytes(8), "entries": bytes(7)}],
            [root, {}],
        )
        for saying in sayings:
            answers = await say(ann, founder, *saying)
            assert isinstance(answers[-1], str), saying
            assert "no message" in answers[-1]
        assert founder.knows(ann)


async def test_what_was_told_of_and_not_sent_is_asked_of_others(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "liar", "ann") as (founder, liar, ann):
        await start(founder, liar, ann)
        for node in (liar, ann):
            await node.connections.join(founder.invite())
        await trio.sleep(SOON_S)
        number = seq_now(ann) + 10**9
        news = {"mesh": founder.mesh, "news": pack_entries({ann.peer: number})}
        assert await say(liar, founder, news) == [{"want": ann.peer.key}]
        ann.membership.record.roles = ("lend",)
        ann.membership.notify()
        await trio.sleep(SOON_S)
        member = founder.membership.member(ann.peer)
        assert member is not None
        assert member.roles == ("lend",)
        assert member.seq < number


async def test_a_node_on_an_old_disk_outbids_what_goes_round_of_it(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    """Its clock was ahead, and is set right when it comes back from a backup. Somebody far away
    knows it as it was."""
    async with (
        world_of_parties() as world,
        ring_of(world, tmp_path, "founder", "ben") as (founder, ben),
    ):
        async with ring_of(world, tmp_path, "ann") as (ann,):
            await start(founder, ben, ann)
            await ben.connections.join(founder.invite())
            await ann.connections.join(founder.invite())
            copy_home(tmp_path / "ann", tmp_path / "old")
            ann.wall.ahead_s = 7200
            ann.membership.record.roles = ("lend",)
            ann.membership.notify()
            await trio.sleep(SOON_S)
            ahead = founder.membership.member(ann.peer)
            grant = founder.ledger.members.shown(founder.mesh, ann.peer)
            assert ahead is not None
            assert grant is not None
            assert ahead.roles == ("lend",)
        (tmp_path / "ann").rename(tmp_path / "new")
        (tmp_path / "old").rename(tmp_path / "ann")
        async with ring_of(world, tmp_path, "ann") as (ann,):
            await start(ann)
            await trio.sleep(SOON_S)
            assert ann.ledger.own_number < ahead.seq
            (page,) = record_pages([(ahead, grant)])
            await say(ben, founder, page)
            believed = founder.membership.member(ann.peer)
            assert believed is not None
            assert believed.claim() == ahead.claim()
            await trio.sleep(2 * SOON_S)
            for node in (founder, ben):
                member = node.membership.member(ann.peer)
                assert member is not None
                assert (member.roles, member.seq) == ((), ahead.seq + 1), node.name
