"""Memberships last while members meet: grants are signed anew, and give nothing new."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from discovery.grants import GRANT_LIFETIME_S, Grant, GrantError, Role
from meshnode import renewal
from meshnode.messages import MessageStream
from tests.lab.parties import Party, parties

Clock = trio.testing.MockClock
DAY_S = 24 * 3600
HALF_S = GRANT_LIFETIME_S // 2


async def settle() -> None:
    await trio.sleep(2 * renewal.CHECK_INTERVAL_S)


def let_pass(seconds: float, *nodes: Party) -> None:
    for node in nodes:
        node.wall.ahead_s += seconds


def place(node: Party, mesh: bytes) -> Grant:
    grant = node.ledger.grant(mesh)
    assert grant is not None
    return grant


async def start(*nodes: Party) -> None:
    for node in nodes:
        node.run_connections()
    await trio.testing.wait_all_tasks_blocked()


async def ask(asker: Party, asked: Party, mesh: object) -> dict[str, object]:
    async with await asker.session(asked).open("renew") as stream:
        messages = MessageStream(stream)
        await messages.send({"mesh": mesh})
        return dict(await messages.receive_untrusted())


async def test_a_grant_is_renewed_when_half_its_time_is_over_and_not_before(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann") as (founder, ann):
        await start(founder, ann)
        await ann.connections.join(founder.invite(Role.WORKER))
        first = place(ann, founder.mesh)
        let_pass(HALF_S - DAY_S, founder, ann)
        await settle()
        assert place(ann, founder.mesh) == first
        let_pass(2 * DAY_S, founder, ann)
        await settle()
        renewed = place(ann, founder.mesh)
        assert renewed.expires_at - first.expires_at > HALF_S - DAY_S
        assert (renewed.role, renewed.may_invite, renewed.since) == (
            first.role,
            first.may_invite,
            first.since,
        )
        assert founder.membership.shown_by(ann.peer)[founder.mesh] == renewed


async def test_members_that_meet_stay_members_beyond_one_grants_time(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        await start(founder, ann, ben)
        await ann.connections.join(founder.invite())
        await ben.connections.join(ann.invite(mesh=founder.mesh))
        for _ in range(7):
            let_pass(60 * DAY_S, founder, ann, ben)
            await settle()
        assert founder.knows(ann)
        assert ann.knows(ben)
        assert place(ben, founder.mesh).since < founder.ledger.now() - 400 * DAY_S


async def test_the_founder_signs_its_own_place_anew_at_its_start(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder") as (founder,):
        first = place(founder, founder.mesh)
        let_pass(GRANT_LIFETIME_S + DAY_S, founder)
        assert founder.ledger.grant(founder.mesh) is None
        assert founder.ledger.renew_own_mesh()
        assert place(founder, founder.mesh).issued_at > first.expires_at
        assert not founder.ledger.renew_own_mesh()


async def test_a_mesh_founded_by_a_clock_that_was_ahead_takes_members_once_it_is_right(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann") as (founder, ann):
        let_pass(3 * GRANT_LIFETIME_S, founder)
        assert founder.ledger.renew_own_mesh()
        let_pass(-3 * GRANT_LIFETIME_S, founder)
        await start(founder, ann)
        await settle()
        await ann.connections.join(founder.invite())
        assert founder.knows(ann)


async def test_nobody_gets_more_than_it_had_or_what_it_lost(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        await start(founder, ann, ben)
        await ann.connections.join(founder.invite())
        await ben.connections.join(ann.invite(mesh=founder.mesh))
        for asker, asked in ((ann, founder), (ben, ann)):
            assert "no longer" in str((await ask(asker, asked, founder.mesh))["refused"])
        assert "no member" in str((await ask(ann, founder, ann.mesh))["refused"])
        assert "no member" in str((await ask(ann, founder, b"nonsense"))["refused"])
        with pytest.raises(GrantError, match="only its inviter"):
            ann.ledger.renew(place(founder, founder.mesh))
        let_pass(HALF_S + DAY_S, founder, ann, ben)
        founder.desk.answer({"op": "remove", "peer": "ann"})
        await settle()
        assert ann.ledger.grant(founder.mesh) is None
        with pytest.raises(GrantError, match="no member"):
            ann.ledger.issue_grant(founder.mesh, ben.peer, Role.PEER)


async def test_a_renewed_grant_that_is_something_else_is_not_taken(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with parties(tmp_path, "founder", "ann") as (founder, ann):
        await start(founder, ann)
        await ann.connections.join(founder.invite(Role.PEER))
        first = place(ann, founder.mesh)
        less = founder.ledger.issue_grant(founder.mesh, ann.peer, Role.CLIENT)
        monkeypatch.setattr(founder.ledger, "renew", lambda _grant: less)
        let_pass(HALF_S + DAY_S, founder, ann)
        await settle()
        assert place(ann, founder.mesh) == first


async def test_a_lesser_invite_does_not_take_anything_away(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann") as (founder, ann):
        await ann.connections.join(founder.invite(Role.PEER))
        token = founder.invite(Role.WORKER)
        await ann.connections.join(token)
        assert ann.membership.role_in(founder.mesh) is Role.PEER
        assert "stays peer in founder's mesh" in ann.warnings()
        kept = founder.ledger.invites.get(token.id)
        assert kept is not None
        assert kept.redeemed_by == ()
