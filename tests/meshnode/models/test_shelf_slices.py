"""The node sees slices among its models: it offers what they hold and takes none for the whole."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from meshnode.models.catalog import Catalog
from meshnode.models.manifest import WantedModel, from_wire_untrusted, to_wire
from meshnode.models.shelf import LocalMatch, Progress, Shelf
from meshnode.models.slice_mark import SLICE_DOCUMENT, IsASlice
from meshnode.models.store.store import Store
from meshnode.models.store.writer import SliceWriter
from tests.meshnode.models.store.slices import SOURCE, Whole, make_whole, pull


@pytest.fixture
def whole(tmp_path: Path) -> Whole:
    return make_whole(tmp_path / "source")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def shelf_of(store: Store, *more: Path) -> Shelf:
    kept = store.folder.parent / "manifests"
    kept.mkdir(exist_ok=True)
    return Shelf([store.folder, *more], kept)


def wanted(whole: Whole) -> WantedModel:
    return from_wire_untrusted(to_wire(whole.manifest))


async def match(shelf: Shelf, whole: Whole) -> LocalMatch:
    return await shelf.match(wanted(whole), "m", Progress())


def offered(found: LocalMatch) -> set[str]:
    lines = (line.split("\t") for line in found.engine_manifest.splitlines())
    return {fields[-1] for fields in lines if fields[0] == "tensor"}


async def test_a_worker_offers_what_its_slice_holds_and_reads_nothing_for_it(
    store: Store, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SliceWriter(whole.create(store).folder) as writer:
        pull(writer, whole, whole.names("blk.1."))
    shelf = shelf_of(store)

    def read(*_: object) -> int:
        raise AssertionError("no weight is read: the digests are kept, and the rest are holes")

    monkeypatch.setattr(os, "preadv", read)
    found = await match(shelf, whole)
    assert offered(found) == set(whole.names("blk.1."))
    assert (set(found.usable), found.differing) == (set(whole.names("blk.1.")), ())
    assert found.missing_count == len(whole.all_names) - len(found.usable)


async def test_what_nobody_has_digested_is_known_by_the_source_it_came_from(
    store: Store, whole: Whole
) -> None:
    made = whole.create(store)
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.names("blk.1."))
    shelf = shelf_of(store)
    tensors = tuple(replace(tensor, digest=None) for tensor in wanted(whole).tensors)
    same = WantedModel(made.identity.provisional, tensors)
    found = await shelf.match(same, "m", Progress())
    assert found.usable == {name: whole.digests[name] for name in whole.names("blk.1.")}
    replaced = WantedModel("ab" * 32, tensors)
    found = await shelf.match(replaced, "m", Progress())
    assert found.usable == {}, "the file was replaced at its source"


async def test_an_empty_or_damaged_slice_offers_nothing(store: Store, whole: Whole) -> None:
    made = whole.create(store)
    assert offered(await match(shelf_of(store), whole)) == set()
    (made.folder / SLICE_DOCUMENT).write_bytes(b"noise")
    assert offered(await match(shelf_of(store), whole)) == set()


async def test_a_part_of_a_model_is_not_served_as_the_whole(store: Store, whole: Whole) -> None:
    made = whole.create(store)
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.names("blk.1."))
    shelf = shelf_of(store)
    assert "m" not in shelf.names()
    for text in ("m", str(made.facts.path)):
        with pytest.raises(IsASlice, match=r"only .* KiB of the .* KiB of m are here"):
            shelf.find(text)


async def test_a_slice_that_holds_all_is_a_model_like_any_other(store: Store, whole: Whole) -> None:
    with SliceWriter(whole.create(store).folder) as writer:
        pull(writer, whole, whole.all_names)
    shelf = shelf_of(store)
    assert "m" in shelf.names()
    manifest = await shelf.manifest(shelf.find("m"))
    assert manifest.root == whole.manifest.root
    assert {entry.digest for entry in manifest.tensors} == set(whole.digests.values())


async def test_of_a_slice_and_the_whole_file_the_whole_is_meant(store: Store, whole: Whole) -> None:
    made = whole.create(store)
    shelf = shelf_of(store, whole.facts.path.parent)
    assert shelf.find("m").path == whole.facts.path
    assert made.facts.path != whole.facts.path
    assert offered(await match(shelf, whole)) == set(whole.all_names)


def test_a_catalog_tells_slices_from_models(store: Store, whole: Whole) -> None:
    made = whole.create(store)
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.names("blk.1."))
    catalog = Catalog([store.folder])
    (entry,) = catalog.scan()
    assert (entry.name, entry.complete, entry.source) == ("m", False, SOURCE)
    assert entry.held_bytes == whole.facts.layer_bytes[1]
    assert entry.size_bytes == whole.facts.path.stat().st_size
    assert catalog.resolve("m") == made.facts.path
    (made.folder / SLICE_DOCUMENT).write_bytes(b"noise")
    (entry,) = catalog.scan()
    assert entry.trouble
    assert (entry.complete, entry.held_bytes) == (False, 0)


def test_what_is_being_made_or_removed_is_not_listed(store: Store, whole: Whole) -> None:
    made = whole.create(store)
    made.folder.rename(store.folder / ".new-1")
    assert Catalog([store.folder]).scan() == ()
