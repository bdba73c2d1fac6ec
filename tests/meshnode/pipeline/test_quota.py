"""Others may have a node pull until its disk is fairly full, or the operator's bound is reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.config import human_bytes
from meshnode.models.bounds import NO_BOUNDS, Bounds
from meshnode.models.fetching import Fetcher
from meshnode.models.store.disk import allocated_bytes
from meshnode.models.store.slice import Slice
from meshnode.models.store.store import Store
from meshnode.models.store.writer import SliceWriter
from meshnode.pipeline import quota
from meshnode.pipeline.quota import OverQuota, Quota
from tests.engine.synthetic import make_model
from tests.lab.sources import FileSource
from tunnels import PeerId

GIB = 2**30
ANN, BEN = (PeerId(bytes(31) + bytes((number,))) for number in (1, 2))


@pytest.fixture
async def part(tmp_path: Path) -> Slice:
    (tmp_path / "models").mkdir()
    source = FileSource(make_model(tmp_path / "m.gguf", layers=2, width=64, ffn=128))
    return await Fetcher(Store(tmp_path / "models"), source.open).obtain("https://example.org/m")


def store_of(part: Slice) -> Store:
    return Store(part.folder.parent)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 GiB, of which 60 are free."""
    monkeypatch.setattr(Quota, "_space", lambda _self: (60 * GIB, 200 * GIB))


@pytest.mark.usefixtures("disk")
async def test_what_others_order_leaves_room_on_the_disk(part: Slice) -> None:
    bound = Quota(store_of(part))
    async with bound.place(ANN) as place:
        place.check_room(part, 50 * GIB)
        with pytest.raises(OverQuota, match=r"60.0 GiB free, and what others order leaves 10.0"):
            place.check_room(part, 50 * GIB + 1)


@pytest.mark.usefixtures("disk")
async def test_orders_that_are_under_way_count_against_one_another(part: Slice) -> None:
    bound = Quota(store_of(part))
    async with bound.place(ANN) as first:
        first.check_room(part, 30 * GIB)
        async with bound.place(BEN) as second:
            with pytest.raises(OverQuota):
                second.check_room(part, 30 * GIB)
            second.check_room(part, 20 * GIB)
    async with bound.place(ANN) as third:
        third.check_room(part, 50 * GIB)


async def test_a_small_disk_keeps_a_tenth(part: Slice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quota, "_space", lambda _self: (GIB, 5 * GIB))
    async with Quota(store_of(part)).place(ANN) as place:
        place.check_room(part, GIB // 2)
        with pytest.raises(OverQuota, match=human_bytes(GIB // 2)):
            place.check_room(part, GIB // 2 + 1)


@pytest.mark.usefixtures("disk")
async def test_the_operators_bound_counts_all_that_is_here(part: Slice) -> None:
    async with Quota(store_of(part), limit_bytes=GIB).place(ANN) as place:
        place.check_room(part, GIB // 2)
        with pytest.raises(OverQuota, match=r"others may fill 1.0 GiB: .*raise --pull-limit"):
            place.check_room(part, GIB)


@pytest.mark.usefixtures("disk")
async def test_what_is_here_already_is_never_too_much(part: Slice) -> None:
    async with Quota(store_of(part), limit_bytes=1).place(ANN) as place:
        place.check_room(part, 0)
        with pytest.raises(OverQuota):
            place.check_beginning(1)


@pytest.mark.usefixtures("disk")
async def test_only_so_many_models_begin_at_others_word(
    part: Slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Quota(store_of(part)).place(ANN) as place:
        place.check_beginning(1)
        monkeypatch.setattr(quota, "MAX_ORDERED_MODELS", 1)
        with pytest.raises(OverQuota, match="no more begin at another node's word"):
            place.check_beginning(1)


@pytest.mark.usefixtures("disk")
async def test_headers_count_like_tensors(part: Slice) -> None:
    held_bytes = allocated_bytes(part.folder)
    bound = Quota(store_of(part), limit_bytes=held_bytes + 1000)
    async with bound.place(ANN) as place:
        place.check_beginning(1000)
        with pytest.raises(OverQuota, match="others may fill"):
            place.check_beginning(1001)
        async with bound.place(BEN) as other:
            other.check_room(part, 600)
            place.check_beginning(400)
            with pytest.raises(OverQuota):
                place.check_beginning(401)


async def test_a_header_that_is_too_large_for_the_bound_never_gets_here(tmp_path: Path) -> None:
    source = FileSource(make_model(tmp_path / "m.gguf", layers=2, width=64, ffn=128))
    store = Store(tmp_path / "models")
    async with Quota(store, limit_bytes=500).place(ANN) as place:
        with pytest.raises(OverQuota, match="others may fill 500"):
            await Fetcher(store, source.open).obtain("https://example.org/m", place)
    assert store.folders() == []


async def begin(store: Store, source: FileSource, place: Bounds, number: int) -> Slice:
    return await Fetcher(store, source.open).obtain(f"https://example.org/{number}", place)


async def test_what_began_in_vain_goes_and_what_came_or_was_here_stays(tmp_path: Path) -> None:
    source = FileSource(make_model(tmp_path / "m.gguf", layers=2, width=64, ffn=128))
    store = Store(tmp_path / "models")
    users = await begin(store, source, NO_BOUNDS, 0)
    bound = Quota(store)
    async with bound.place(ANN) as place:
        assert (await begin(store, source, place, 0)).folder == users.folder
        bare, filled = [await begin(store, source, place, number) for number in (1, 2)]
        with SliceWriter(filled.folder) as writer:
            (span,) = writer.missing([filled.facts.tensors[0].name])
            writer.write(span.file_index, span.start, memoryview(bytes(100)))
            writer.done(span.file_index, span.start, span.start + 100)
        assert bare.folder in store.folders()
    assert sorted(store.folders()) == sorted([users.folder, filled.folder])


async def test_what_this_nodes_user_wants_too_by_now_stays(tmp_path: Path) -> None:
    """Between its header and its first tensor a plan is made."""
    source = FileSource(make_model(tmp_path / "m.gguf", layers=2, width=64, ffn=128))
    store = Store(tmp_path / "models")
    mine = Fetcher(store, source.open)
    theirs = mine.under_other_rules(source.open)
    bound = Quota(store)
    async with bound.place(ANN) as place:
        wanted, vain = [await theirs.obtain(f"https://a.org/{n}", place) for n in (1, 2)]
        assert (await mine.obtain("https://a.org/1")).folder == wanted.folder
        async with bound.place(BEN) as other:
            assert (await theirs.obtain("https://a.org/2", other)).folder == vain.folder
    assert store.folders() == [wanted.folder]


async def test_one_member_does_not_shut_out_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "MAX_BEGUN_BY_ONE", 2)
    source = FileSource(make_model(tmp_path / "m.gguf", layers=2, width=64, ffn=128))
    store = Store(tmp_path / "models")
    bound = Quota(store)
    async with bound.place(ANN) as anns, bound.place(BEN) as bens:
        begun = [await begin(store, source, anns, number) for number in (0, 1)]
        with pytest.raises(OverQuota, match="2 models were begun here at the same node's word"):
            await begin(store, source, anns, 2)
        await begin(store, source, anns, 1)
        await begin(store, source, bens, 3)
        store.remove(begun[0].folder)
        await begin(store, source, anns, 4)
