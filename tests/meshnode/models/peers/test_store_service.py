"""Members give each other what they hold of models, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.errors import DiskFull
from meshnode.models.peers.offers import Offers, held_spans
from meshnode.models.peers.protocol import ReadRequest
from meshnode.models.peers.service import StoreService
from meshnode.models.peers.source import Holders
from meshnode.models.pull.source import SourceError
from meshnode.models.store.locks import SliceInUse
from meshnode.models.store.thinning import drop_tensors
from meshnode.models.store.writer import SliceWriter
from tests.lab.stalls import unfinished, until
from tests.meshnode.models.peers.serving import (
    FIRST,
    REFERENCE,
    SECOND,
    fetch,
    scene,
)


async def test_what_members_hold_is_not_asked_of_the_source(tmp_path: Path) -> None:
    async with scene(tmp_path, 2) as stage:
        await stage.hold(stage.members[0], *FIRST)
        await stage.hold(stage.members[1], *SECOND)
        part = await stage.fetcher.obtain(REFERENCE)
        stage.source.is_there = False
        assert await fetch(stage, part, *FIRST, *SECOND) == {*FIRST, *SECOND}


async def test_what_no_member_holds_comes_from_the_source_and_no_more(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage:
        await stage.hold(stage.members[0], *FIRST)
        part = await stage.fetcher.obtain(REFERENCE)
        stage.source.asked.clear()
        assert await fetch(stage, part, *FIRST, *SECOND) == {*FIRST, *SECOND}
        second = [tensor for tensor in part.facts.tensors if tensor.name in SECOND]
        assert stage.source.asked_bytes < 1.1 * sum(tensor.nbytes for tensor in second)


async def test_a_header_comes_from_a_member_where_the_source_is_gone(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage:
        held = await stage.hold(stage.members[0], *FIRST)
        stage.source.is_there = False
        provisional = held.identity.provisional
        part = await stage.fetcher.obtain_from_holders(REFERENCE, provisional)
        assert part is not None
        assert part.identity.provisional == provisional
        assert await fetch(stage, part, *FIRST) == set(FIRST)
        assert await stage.fetcher.obtain_from_holders(REFERENCE, "00" * 32) is None


async def test_what_is_not_held_is_not_given(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage:
        (member,) = stage.members
        held = await stage.hold(member, *FIRST)
        holder = await member.as_source()
        assert holder.holds == held_spans(held)
        hole = next(t for t in held.facts.tensors if t.name == SECOND[0])
        given: list[bytes] = []
        beyond = (
            (0, hole.offset, hole.offset + 100),
            (0, 0, holder.files[0].size_bytes),
            (7, 0, 10),
        )
        for place in beyond:
            with pytest.raises(SourceError, match="not here any more"):
                await holder.read(*place, lambda data: given.append(bytes(data)))
        assert given == []


async def test_what_a_member_is_being_given_is_not_dropped(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage:
        (member,) = stage.members
        part = await stage.hold(member, *FIRST)
        place = next(one for one in part.held if one.name == FIRST[1])
        request = ReadRequest(
            part.identity.provisional, 0, place.offset, place.offset + place.nbytes
        )
        service = StoreService(Offers(member.store))
        opened = service._open(request)
        assert not isinstance(opened, str)
        with pytest.raises(SliceInUse):
            drop_tensors(part.folder, FIRST)
        opened.using.close()
        assert drop_tensors(part.folder, FIRST) > 0
        assert service._open(request) == "these bytes are not here any more"


async def test_what_somebody_wrote_into_is_not_given(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage:
        (member,) = stage.members
        held = await stage.hold(member, *FIRST)
        with held.facts.path.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"x")
        holders = Holders(lambda: [member.session], lambda _: "ben")
        assert await holders.find(held.identity.provisional) == []


async def test_a_header_is_not_read_again_for_each_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path) as stage:
        (member,) = stage.members
        await stage.hold(member, *FIRST, *SECOND)
        holder = await member.as_source()
        read: list[Path] = []
        monkeypatch.setattr("meshnode.models.store.slice.read_facts", read.append)
        for at in range(3):
            await holder.read(0, at * 100, at * 100 + 100, lambda _data: None)
        assert read == []


async def test_what_was_dropped_is_not_given_though_it_was_a_moment_ago(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage:
        (member,) = stage.members
        held = await stage.hold(member, *FIRST)
        holder = await member.as_source()
        tensor = next(t for t in held.facts.tensors if t.name == FIRST[0])
        place = (0, tensor.offset, tensor.offset + tensor.nbytes)
        given: list[bytes] = []
        await holder.read(*place, lambda data: given.append(bytes(data)))
        assert b"".join(given) == held.facts.path.read_bytes()[place[1] : place[2]]
        await until(lambda: not unfinished(member.endpoint.sessions()[0]))
        with SliceWriter(held.folder) as writer:
            writer.drop([FIRST[0]])
        with pytest.raises(SourceError, match="not here any more"):
            await holder.read(*place, lambda _data: None)
        member.store.remove(held.folder)
        with pytest.raises(SourceError, match="not here any more"):
            await holder.read(*place, lambda _data: None)


async def test_what_came_a_moment_ago_is_given_too(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage:
        (member,) = stage.members
        for names in (FIRST, SECOND):
            held = await stage.hold(member, *names)
            holder = await member.as_source()
            assert holder.holds == held_spans(held)
            tensor = next(t for t in held.facts.tensors if t.name == names[0])
            await holder.read(0, tensor.offset, tensor.offset + 100, lambda _data: None)


async def test_what_the_disk_says_comes_out_as_it_is(tmp_path: Path) -> None:
    async with scene(tmp_path) as stage:
        (member,) = stage.members
        await stage.hold(member, *FIRST)
        holder = await member.as_source()

        def full(_data: memoryview) -> None:
            raise DiskFull("the disk is full")

        with pytest.raises(DiskFull):
            await holder.read(0, 0, 1000, full)
