"""Who is put out stays out, whichever node comes back from an old disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import trio
import trio.testing

from meshnode.errors import AccessError
from tests.lab.parties import (
    ON_HEARING_S,
    join,
    remove,
    ring_of,
    run_all,
    world_of_parties,
)

Clock = trio.testing.MockClock


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
