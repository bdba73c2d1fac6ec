"""Slices are made, found and removed; what is not whole never passes for a model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshnode.errors import DiskFull, ModelError
from meshnode.models.manifest import digest_model, digest_tensors
from meshnode.models.slice_mark import SLICE_DOCUMENT, IsASlice
from meshnode.models.store import disk
from meshnode.models.store.disk import NoHoles, NoRoom, allocated_bytes
from meshnode.models.store.locks import USE_LOCK, SliceInUse
from meshnode.models.store.slice import SliceDamaged, open_slice, slice_of
from meshnode.models.store.store import NewFile, Store
from meshnode.models.store.writer import SliceWriter
from tests.meshnode.models.store.slices import SOURCE, VALIDATOR, Whole, make_whole, pull


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def test_a_new_slice_is_as_long_as_its_model_and_takes_no_room(
    store: Store, tmp_path: Path
) -> None:
    whole = make_whole(tmp_path / "large", layers=8, width=256, ffn=512)
    made = whole.create(store)
    (path,) = made.facts.files
    assert path.stat().st_size == whole.facts.path.stat().st_size
    assert allocated_bytes(made.folder) < 128 * 1024 < path.stat().st_size
    assert made.facts.tensors == whole.facts.tensors
    assert (made.held, made.held_bytes, made.complete) == ((), 0, False)
    assert made.identity.root is None


def test_a_slice_is_found_by_source_identity_and_name(store: Store, whole: Whole) -> None:
    made = whole.create(store)
    assert store.by_source(SOURCE, VALIDATOR) == made
    assert store.by_source(SOURCE, "etag:2") is None, "the file was replaced at its source"
    assert store.by_identity(made.identity.provisional) == made
    assert store.by_identity("ab" * 32) is None
    assert store.by_name("M") == (made,)
    assert store.by_name("n") == ()
    assert Store(store.folder / "nowhere").by_name("m") == ()


def test_two_models_of_one_name_lie_side_by_side(store: Store, whole: Whole) -> None:
    folders = {whole.create(store, f"etag:{number}").folder for number in range(2)}
    assert len(folders) == 2
    assert {found.folder for found in store.by_name("m")} == folders


def test_who_makes_what_another_task_has_just_made_gets_that(store: Store, whole: Whole) -> None:
    made = whole.create(store)
    assert whole.create(store).folder == made.folder
    assert store.folders() == [made.folder]
    (made.folder / "slice.cbor").write_bytes(b"rotten")
    assert whole.create(store).folder != made.folder, "a damaged one is left alone"
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".")]


def test_shards_are_one_slice(store: Store, tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "sharded", shards=3)
    made = whole.create(store)
    assert len(made.facts.files) == 3
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.all_names)
    found = open_slice(made.folder)
    assert found.complete
    assert found.identity.root == whole.manifest.root


def test_a_header_that_was_cut_short_makes_no_slice(store: Store, whole: Whole) -> None:
    (file,) = whole.files()
    for header in (b"", b"GGUF", file.header[: len(file.header) // 2], file.header[:-40]):
        with pytest.raises(ModelError):
            store.create([NewFile(file.name, file.size_bytes, header)], SOURCE, VALIDATOR)
    assert list(store.folder.iterdir()) == []


def test_a_file_shorter_than_its_header_announces_makes_no_slice(
    store: Store, whole: Whole
) -> None:
    (file,) = whole.files()
    with pytest.raises(ModelError, match="truncated"):
        store.create([NewFile(file.name, file.size_bytes // 2, file.header)], SOURCE, VALIDATOR)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["../m.gguf"],
        ["m"],
        [".gguf"],
        ["m-00001-of-00002.gguf"],
        ["m-00002-of-00002.gguf", "m-00001-of-00002.gguf"],
        ["a.gguf", "b.gguf"],
    ],
)
def test_names_that_no_model_has_are_refused(store: Store, names: list[str]) -> None:
    with pytest.raises(ModelError):
        store.create([NewFile(name, 10, b"GGUF") for name in names], SOURCE, VALIDATOR)


# -- what is not whole ----------------------------------------------------------------------------


def test_a_slice_is_never_digested_as_if_its_holes_were_weights(store: Store, whole: Whole) -> None:
    made = whole.create(store)
    with pytest.raises(IsASlice):
        digest_model(made.facts)
    (made.folder / SLICE_DOCUMENT).write_bytes(b"damaged")
    with pytest.raises(IsASlice):
        digest_model(made.facts)


def test_a_slice_taken_out_of_its_folder_is_still_known_by_its_holes(
    store: Store, tmp_path: Path
) -> None:
    whole = make_whole(tmp_path / "large", layers=1, width=1024, ffn=1024)
    made = whole.create(store)
    assert max(tensor.nbytes for tensor in made.facts.tensors) >= 2**20
    (made.folder / SLICE_DOCUMENT).unlink()
    with pytest.raises(IsASlice, match="has nothing where"):
        digest_model(made.facts)


def test_a_tensor_of_zeros_that_was_written_is_a_tensor(tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "large", layers=1, width=1024, ffn=1024)
    largest = max(whole.facts.tensors, key=lambda tensor: tensor.nbytes)
    with whole.facts.path.open("r+b") as file:
        file.seek(largest.offset)
        file.write(bytes(largest.nbytes))
    digest_model(whole.facts)


def test_a_file_that_is_no_slice_is_none(whole: Whole) -> None:
    assert slice_of(whole.facts.path) is None


# -- damage ---------------------------------------------------------------------------------------


def test_a_damaged_document_is_a_sentence_and_no_slice(store: Store, whole: Whole) -> None:
    made = whole.create(store)
    (made.folder / SLICE_DOCUMENT).write_bytes(b"noise")
    with pytest.raises(SliceDamaged, match=r"mesh models rm m\b"):
        slice_of(made.facts.path)
    assert list(store.slices()) == []
    assert store.by_source(SOURCE, VALIDATOR) is None
    assert store.folders() == [made.folder], "it can still be removed"
    assert store.remove(made.folder).name == "m"


def test_files_of_another_length_are_no_slice(store: Store, whole: Whole) -> None:
    made = whole.create(store)
    with made.facts.path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(SliceDamaged, match="are not those"):
        open_slice(made.folder)


def test_another_header_is_another_model(store: Store, whole: Whole, tmp_path: Path) -> None:
    made = whole.create(store)
    data = made.facts.path.read_bytes().replace(b"synthetic", b"another-n")
    made.facts.path.write_bytes(data)
    with pytest.raises(SliceDamaged, match="are not those"):
        open_slice(made.folder)


def test_a_header_that_has_weights_elsewhere_is_damaged(store: Store, whole: Whole) -> None:
    """The digest of the header is of the metadata, and would not show it."""
    made = whole.create(store)
    data = bytearray(made.facts.path.read_bytes())
    name, other = b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"
    at, there = data.index(name), data.index(other)
    data[at : at + len(name)], data[there : there + len(other)] = other, name
    made.facts.path.write_bytes(data)
    with pytest.raises(SliceDamaged, match="are not those"):
        open_slice(made.folder)


# -- room -----------------------------------------------------------------------------------------


def test_a_file_system_without_holes_is_refused(
    store: Store, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "ftruncate", lambda fd, size: os.pwrite(fd, bytes(size), 0))
    with pytest.raises(NoHoles, match="FAT"):
        whole.create(store)
    assert list(store.folder.iterdir()) == []


def test_a_disk_with_too_little_room_is_told_before_a_byte_is_written(
    store: Store, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = whole.create(store)
    with SliceWriter(made.folder) as writer:
        writer.check_room(whole.all_names)
        monkeypatch.setattr(disk, "_space", lambda _: (1000, 1 << 40))
        with pytest.raises(NoRoom, match=r"pulling m needs .* KiB more in .*gc --keep"):
            writer.check_room(whole.all_names)
        pull(writer, whole, whole.all_names)
        writer.check_room(whole.all_names)  # nothing is missing: nothing is needed
    with pytest.raises(NoRoom, match="the header of m needs"):
        whole.create(store)


def test_a_full_disk_at_the_beginning_leaves_nothing(
    store: Store, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        whole.create(store)
    assert list(store.folder.iterdir()) == []


# -- removing -------------------------------------------------------------------------------------


def used_at(made_folder: Path, seconds: int) -> None:
    (made_folder / USE_LOCK).touch()
    os.utime(made_folder / USE_LOCK, (seconds, seconds))


def filled(store: Store, whole: Whole, number: int) -> Path:
    made = whole.create(store, f"etag:{number}")
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.all_names)
    used_at(made.folder, 1000 + number)
    return made.folder


def test_slices_not_used_for_longest_go_first(store: Store, whole: Whole) -> None:
    folders = [filled(store, whole, number) for number in range(4)]
    used_at(folders[0], 9000)
    each_bytes = allocated_bytes(folders[0])
    found = store.collect(2 * each_bytes + each_bytes // 2)
    assert [one.name for one in found.removed] == [folders[1].name, folders[2].name]
    assert found.in_use == ()
    assert sum(one.freed_bytes for one in found.removed) >= 2 * (each_bytes - 8192)
    assert found.left_bytes == sum(allocated_bytes(folders[n]) for n in (0, 3))
    assert store.folders() == sorted([folders[0], folders[3]])


def test_headers_of_which_nothing_came_go_however_much_room_there_is(
    store: Store, whole: Whole
) -> None:
    kept = filled(store, whole, 1)
    old, new = (whole.create(store, f"etag:{number}").folder for number in (2, 3))
    begun = whole.create(store, "etag:4")
    with SliceWriter(begun.folder) as writer:
        (span, *_) = writer.missing([whole.all_names[0]])
        writer.write(span.file_index, span.start, memoryview(bytes(10)))
        writer.done(span.file_index, span.start, span.start + 10)
    for folder in (old, begun.folder):
        used_at(folder, 2000)
    with open_slice(old).use():  # which makes it new
        assert store.collect(10**12).removed == ()
    used_at(old, 2000)
    found = store.collect(10**12)
    assert [one.name for one in found.removed] == [old.name]
    assert store.folders() == sorted([kept, new, begun.folder])


def test_a_slice_in_use_stays_and_so_does_one_that_is_written_to(
    store: Store, whole: Whole
) -> None:
    read, written, idle = (filled(store, whole, number) for number in range(3))
    with open_slice(read).use(), SliceWriter(written):
        found = store.collect(0)
        for folder in (read, written):
            with pytest.raises(SliceInUse, match="try again"):
                store.remove(folder)
    assert [one.name for one in found.removed] == [idle.name]
    assert sorted(found.in_use) == sorted([read.name, written.name])
    assert store.folders() == sorted([read, written])


def test_nothing_outside_the_store_is_removed(store: Store, whole: Whole, tmp_path: Path) -> None:
    made = whole.create(Store(tmp_path / "elsewhere"))
    with pytest.raises(ModelError, match="left alone"):
        store.remove(made.folder)
    assert made.folder.is_dir()


def test_what_a_kill_left_half_made_or_half_removed_is_swept_away(
    store: Store, whole: Whole
) -> None:
    made = whole.create(store)
    for name in (".new-1", ".gone-1"):
        (store.folder / name).mkdir()
        (store.folder / name / "m.gguf").write_bytes(b"x")
    store.sweep()
    assert list(store.folder.iterdir()) == [made.folder]


def test_some_tensors_can_be_digested_alone(whole: Whole) -> None:
    entries = digest_tensors(whole.facts, whole.facts.tensors[2:4])
    assert {entry.name: entry.digest for entry in entries}.items() <= whole.digests.items()
    assert len(entries) == 2
