"""A member that makes news without end: it is heard slowly, and costs the others little."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from discovery.grants import Role, issue
from discovery.revocations import Revocation, revoke_peer
from discovery.roster import Member
from meshnode import membership, removal
from meshnode.dialling import DIALS
from meshnode.introduction import MAX_CANDIDATES, record_pages, revocation_pages
from meshnode.messages import MessageStream
from tests.lab.parties import ON_HEARING_S, Party, remove, ring
from tunnels import Candidate, Identity, PeerId, Session, TunnelError
from tunnels.allowance import Rate

Clock = trio.testing.MockClock


def restated(liar: Party, mesh: bytes) -> Iterator[Revocation]:
    """True, and news each time: the same of one that nobody knows, a moment later."""
    nobody = Identity.generate().peer
    for at in itertools.count(int(liar.ledger.now())):
        yield revoke_peer(
            liar.ledger.identity.sign,
            mesh=mesh,
            peer=nobody,
            issuer=liar.peer,
            at=at,
            grant=liar.ledger.grant(mesh),
        )


async def test_a_stream_for_each_page_is_heard_no_faster(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one stream has cost is owed on the next."""
    async with ring(tmp_path, "founder", "ann") as (founder, ann):
        taken: list[object] = []
        monkeypatch.setattr(founder.membership, "take", taken.append)
        monkeypatch.setattr(membership, "perf_counter", itertools.count(step=0.1).__next__)
        news = restated(ann, founder.mesh)

        async def pour() -> None:
            while True:
                page = revocation_pages([next(news)])[0]
                with contextlib.suppress(TunnelError), trio.move_on_after(0.5):
                    async with await ann.session(founder).open("revocations") as stream:
                        await MessageStream(stream).send({**page, "more": True})
                        await stream.receive_some()

        with trio.move_on_after(120):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(pour)
        assert 10 <= len(taken) < 60, "a burst, then three hundredths of each second"


async def test_news_without_end_is_passed_on_together(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each word of one costs the node as many streams as there are members."""
    monkeypatch.setattr(removal, "TELLINGS", Rate(per_s=2, burst=4))
    async with ring(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        news = restated(ann, founder.mesh)
        passing_on = founder.connections.removal
        tell, told = passing_on.tell, Counter[PeerId]()

        async def count(session: Session, said: list[Revocation]) -> bool:
            told[session.peer] += 1
            return await tell(session, said)

        monkeypatch.setattr(passing_on, "tell", count)
        for _ in range(500):
            founder.membership.take([next(news)])
            await trio.sleep(0.04)
        assert 15 <= told[ben.peer] <= 25, "two at once and one a second: it has two to tell"
        await trio.sleep(10)
        last = next(news)
        founder.membership.take([last])
        await trio.sleep(10)
        assert ben.ledger.revocations.knows(last)


async def test_amid_news_without_end_a_removed_member_is_out_at_once(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with ring(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        session = founder.session(ben)
        news = restated(ann, founder.mesh)
        for _ in range(200):
            founder.membership.take([next(news)])
            await trio.sleep(0.05)
        remove(founder, ben)
        assert not founder.lets_in(ben)
        await trio.sleep(ON_HEARING_S)
        assert session.closed.is_set()


async def test_members_that_a_member_makes_up_are_dialled_slowly(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with as many addresses as there may be."""
    async with ring(tmp_path, "founder", "ann") as (founder, ann):
        own = ann.ledger.grant(founder.mesh)
        assert own is not None
        ghosts = [Identity.generate() for _ in range(64)]
        seq = int(founder.ledger.now() * 1000)
        records = []
        for number, ghost in enumerate(ghosts):
            places = tuple(
                Candidate("quic", f"11.9.{number}.{n}", 4433) for n in range(MAX_CANDIDATES)
            )
            grant = issue(
                own,
                ann.ledger.identity.sign,
                peer=ghost.peer,
                role=Role.CLIENT,
                issued_at=own.issued_at,
                may_invite=False,
            )
            records.append((Member(ghost.peer, "ghost", places, seq=seq).signed(ghost.sign), grant))
        dialled: list[PeerId] = []
        connect = founder.endpoint.connect

        async def count(peer: PeerId, places: list[Candidate]) -> object:
            dialled.append(peer)
            return await connect(peer, places)

        monkeypatch.setattr(founder.endpoint, "connect", count)
        async with await ann.session(founder).open("roster") as stream:
            for page in record_pages(records):
                await MessageStream(stream).send(page)
            await stream.send_eof()
            await stream.receive_some()
        assert all(founder.membership.member(ghost.peer) for ghost in ghosts)
        await trio.sleep(60)
        assert len(dialled) == pytest.approx(
            (DIALS.burst + 60 * DIALS.per_s) / MAX_CANDIDATES, abs=2
        )
