"""A member that is hostile gains nothing by what it tells, calls itself or shows."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from discovery import revocations
from discovery.grants import Role
from discovery.revocations import REMEMBERED_S, Revocation, encode_revocation, revoke_peer
from meshnode import membership
from meshnode.messages import MessageStream
from tests.lab.parties import (
    ON_HEARING_S,
    join,
    parties,
    ring,
    run_all,
)
from tunnels import Stream, TunnelError

Clock = trio.testing.MockClock


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
        monkeypatch.setattr(membership, "perf_counter", itertools.count(step=0.1).__next__)
        with trio.move_on_after(60):
            while True:
                with contextlib.suppress(TunnelError):
                    async with await ann.session(founder).open("revocations") as stream:
                        await pour(stream)
        assert 10 <= len(pages) < 50, "a burst, then three hundredths of each second"
        assert founder.knows(ann)


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
        monkeypatch.setattr(out.ledger.members, "proven", lambda _peer: frozenset({other.mesh}))
        await out.introduce_to(lender)
        lender.desk.answer({"op": "remove", "peer": str(out.peer), "mesh": "own"})
        await trio.sleep(ON_HEARING_S)
        assert session.closed.is_set()
        with pytest.raises(TunnelError):
            await stream.send_all(b"still there?")
