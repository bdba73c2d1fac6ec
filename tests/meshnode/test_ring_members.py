"""Of the ring, what membership decides: who may push at all, and who is reached for whose lease."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from discovery.grants import Role
from meshnode import connections
from meshnode.errors import NetworkError
from tests.lab.parties import Party, join, parties, ring, run_all
from tunnels import PeerId

Clock = trio.testing.MockClock


def name_predecessor(worker: Party, peer: PeerId, lease: str) -> None:
    worker.membership.may_push = lambda who, which: (who, which) == (peer, lease)


async def test_a_member_pushes_only_where_a_lease_names_it(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with ring(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        assert not founder.lets_in(ann, "push/1"), "its role alone is not enough"
        name_predecessor(founder, ann.peer, "1")
        assert founder.lets_in(ann, "push/1")
        assert not founder.lets_in(ann, "push/2")
        assert not founder.lets_in(ann, "push/")
        assert not founder.lets_in(ben, "push/1")


async def test_a_lease_names_in_vain_whose_role_does_not_push(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "founder", "ann") as (founder, ann):
        run_all(founder, ann)
        await trio.testing.wait_all_tasks_blocked()
        await join(founder, ann, role=Role.ORCHESTRATOR)
        name_predecessor(founder, ann.peer, "1")
        assert not founder.lets_in(ann, "push/1")


async def test_a_stranger_whom_a_lease_names_does_not_push(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with parties(tmp_path, "ann", "ben") as (ann, ben):
        await ben.dial(ann)
        name_predecessor(ann, ben.peer, "1")
        assert not ann.lets_in(ben, "push/1")


async def test_for_a_lease_a_member_of_the_same_mesh_is_found(
    tmp_path: Path, autojump_clock: Clock
) -> None:
    async with ring(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        session = await ann.connections.reach_for(ben.peer, founder.peer)
        assert session is ann.session(ben)
        await session.aclose("for now")
        assert (await ann.connections.reach_for(ben.peer, founder.peer)).peer == ben.peer


async def test_a_way_through_a_relay_is_waited_to_become_a_straight_one(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ring(tmp_path, "founder", "ann", "ben") as (founder, ann, ben):
        link = ann.session(ben).best_link
        assert link is not None
        with monkeypatch.context() as while_relayed:
            while_relayed.setattr(connections, "KIND", link.kind)
            with trio.move_on_after(5) as waited:
                await ann.connections.reach_for(ben.peer, founder.peer)
            assert waited.cancelled_caught
        assert await ann.connections.reach_for(ben.peer, founder.peer) is ann.session(ben)


async def test_for_a_lease_nobody_of_another_mesh_is_sought(
    tmp_path: Path, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A borrower of one mesh learns nothing of whom the worker knows in another, and cannot have
    it dial them."""
    async with parties(tmp_path, "ann", "ben", "carl") as (ann, ben, carl):
        run_all(ann, ben, carl)
        await trio.testing.wait_all_tasks_blocked()
        await join(ann, carl)
        await join(ben, carl)
        await carl.session(ben).aclose("for now")

        async def dial(peer: PeerId) -> None:
            raise AssertionError(f"{peer.short} is dialled")

        monkeypatch.setattr(carl.connections.dialling, "reach", dial)
        for stranger in (ben.peer, PeerId(bytes(range(32)))):
            with pytest.raises(NetworkError, match="no member of a mesh that both are in"):
                await carl.connections.reach_for(stranger, ann.peer)
