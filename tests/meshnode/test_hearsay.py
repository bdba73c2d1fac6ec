"""Whoever joins by one token finds all who are there, and nobody who is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from discovery.grants import Role
from discovery.roster import Member
from meshnode.hearsay import SAVE_EVERY_S
from meshnode.introduction import MAX_RECORDS, record_pages
from meshnode.ledger import MAX_HEARD_OF_ONE
from meshnode.messages import MessageStream
from tests.lab.parties import Party, parties, recorded_messages
from tunnels import Candidate, Identity

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
        grant = founder.ledger.shown(founder.mesh, ann.peer)
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
        grant = founder.ledger.shown(founder.mesh, two.peer)
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
