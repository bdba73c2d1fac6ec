"""Bytes come in, tensors are held; what is wrong, lost or cut short is never held."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from meshnode.errors import ModelError
from meshnode.models.spans import Span
from meshnode.models.store import disk
from meshnode.models.store.disk import allocated_bytes
from meshnode.models.store.locks import SliceInUse
from meshnode.models.store.slice import Slice, held_manifest, open_slice
from meshnode.models.store.store import Store
from meshnode.models.store.writer import SliceWriter
from tests.meshnode.models.store.slices import (
    Whole,
    held,
    holds_the_right_bytes,
    make_whole,
    pull,
)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def count_reading(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of weights that are read, from now on."""
    read: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(fd, buffers, offset)
        read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counted)
    return read


def test_a_layer_is_pulled_and_held(made: Slice, whole: Whole) -> None:
    layer = whole.names("blk.1.")
    with SliceWriter(made.folder) as writer:
        pulled = pull(writer, whole, layer)
        assert writer.missing(layer) == ()
    found = open_slice(made.folder)
    assert {tensor.name for tensor in found.held} == set(layer)
    assert holds_the_right_bytes(found, whole)
    assert found.document.held_bytes == found.held_bytes == whole.facts.layer_bytes[1]
    assert len(pulled) == 1, "neighbours are joined"
    assert not found.complete
    assert found.identity.root is None


def test_a_slice_grows_until_it_is_the_model(made: Slice, whole: Whole) -> None:
    for part in ("blk.0.", "blk.2.", ""):
        with SliceWriter(made.folder) as writer:
            pull(writer, whole, whole.names(part))
    found = open_slice(made.folder)
    assert found.complete
    assert found.identity.root == whole.manifest.root
    assert found.identity.provisional == made.identity.provisional
    assert found.facts.path.read_bytes() == whole.facts.path.read_bytes()


def test_digests_of_who_has_the_whole_make_the_root_known_at_once(
    made: Slice, whole: Whole
) -> None:
    with SliceWriter(made.folder, whole.digests) as writer:
        pull(writer, whole, whole.names("blk.0."))
    assert open_slice(made.folder).identity.root is None, "nobody has proven anything"
    with SliceWriter(made.folder, whole.digests, root=whole.manifest.root) as writer:
        pull(writer, whole, whole.names("blk.1."))
    found = open_slice(made.folder)
    assert found.identity.root == whole.manifest.root
    assert not found.complete
    assert set(found.document.digests) == held(made.folder), "hearsay is not kept"


def test_many_connections_write_at_once_in_any_order(made: Slice, whole: Whole) -> None:
    with SliceWriter(made.folder, whole.digests) as writer:
        pieces = [
            Span(span.file_index, start, min(start + 3001, span.stop))
            for span in writer.missing(whole.all_names)
            for start in range(span.start, span.stop, 3001)
        ]
        pieces = pieces[::2] + pieces[1::2]

        def connection(mine: list[Span]) -> None:
            for span in mine:
                writer.write(span.file_index, span.start, memoryview(whole.bytes_of(span)))
                assert writer.done(span.file_index, span.start, span.stop) == ()

        threads = [
            threading.Thread(target=connection, args=(pieces[number::4],)) for number in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = open_slice(made.folder)
    assert found.complete
    assert holds_the_right_bytes(found, whole)


def test_what_came_in_between_is_not_written_over_what_is_held(made: Slice, whole: Whole) -> None:
    """Neighbours are fetched together with what lies between them."""
    middle = whole.names("blk.1.")
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, middle)
        size_bytes = made.document.size_bytes
        writer.write(0, 0, memoryview(bytes(size_bytes)))
        writer.save()
        found = open_slice(made.folder)
        assert holds_the_right_bytes(found, whole)
        assert len(found.held) == len(middle)


def test_bytes_beyond_the_end_are_refused(made: Slice) -> None:
    size_bytes = made.document.size_bytes
    with SliceWriter(made.folder) as writer, pytest.raises(ValueError, match="beyond the file"):
        writer.write(0, size_bytes - 1, memoryview(b"xx"))


def test_a_name_that_the_model_has_not_is_told(made: Slice) -> None:
    with SliceWriter(made.folder) as writer, pytest.raises(ModelError, match=r"no tensor blk.9.x"):
        writer.missing(["blk.9.x"])


# -- wrong bytes ----------------------------------------------------------------------------------


def test_bytes_other_than_expected_are_thrown_away_and_missing_again(
    made: Slice, whole: Whole
) -> None:
    name = "blk.1.ffn_up.weight"
    (wanted,) = (t for t in whole.facts.tensors if t.name == name)
    with SliceWriter(made.folder, whole.digests) as writer:
        (span,) = writer.missing(whole.names("blk.1."))
        data = bytearray(whole.bytes_of(span))
        data[wanted.offset - span.start + 5] ^= 1
        writer.write(0, span.start, memoryview(data))
        wrong = writer.done(0, span.start, span.stop)
        place = Span(0, wanted.offset, wanted.offset + wanted.nbytes)
        assert wrong == (place,)
        assert writer.missing(whole.names("blk.1.")) == (place,)
        assert pull(writer, whole, [name]) == [place]
    assert held(made.folder) == set(whole.names("blk.1."))
    assert holds_the_right_bytes(open_slice(made.folder), whole)


def test_a_tensor_that_was_held_once_is_compared_when_it_comes_again(
    made: Slice, whole: Whole, tmp_path: Path
) -> None:
    other = make_whole(tmp_path / "other", seed=1)
    layer = whole.names("blk.1.")
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, layer)
        writer.drop(layer)
        (span,) = writer.missing(layer)
        writer.write(0, span.start, memoryview(other.bytes_of(span)))
        assert writer.done(0, span.start, span.stop)
        assert writer.missing(layer)
    assert not any("ffn_up" in name for name in held(made.folder))


# -- dropped --------------------------------------------------------------------------------------


def test_what_is_dropped_gives_its_room_back(tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "large", layers=4, width=256, ffn=512)
    made = whole.create(Store(tmp_path / "models"))
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.all_names)
        writer.save()
        before = allocated_bytes(made.folder)
        freed_bytes = writer.drop(whole.names("blk.2."))
        assert freed_bytes == whole.facts.layer_bytes[2]
        assert allocated_bytes(made.folder) <= before - freed_bytes + 16384
    found = open_slice(made.folder)
    assert not any("blk.2." in tensor.name for tensor in found.held)
    assert holds_the_right_bytes(found, whole)
    assert found.identity.root == whole.manifest.root, "its digests stay known"
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.all_names)
    assert open_slice(made.folder).complete


def test_nothing_is_dropped_while_somebody_reads(made: Slice, whole: Whole) -> None:
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.names("blk.1."))
        with made.use(), pytest.raises(SliceInUse):
            writer.drop(whole.names("blk.1."))
    assert held(made.folder) == set(whole.names("blk.1."))


def test_where_no_holes_can_be_punched_the_tensor_is_dropped_all_the_same(
    made: Slice, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_fallocate", None)
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.names("blk.1."))
        assert writer.drop(whole.names("blk.1.")) == 0, "it says that no room came back"
    assert held(made.folder) == set()


# -- who else is there ----------------------------------------------------------------------------


def test_one_writes_and_the_second_is_told(made: Slice) -> None:
    with SliceWriter(made.folder), pytest.raises(SliceInUse, match="being written to by another"):
        SliceWriter(made.folder)
    SliceWriter(made.folder).close()


def test_a_writer_is_closed_once_and_again(made: Slice) -> None:
    writer = SliceWriter(made.folder)
    writer.close()
    writer.close()


# -- what a reader may believe --------------------------------------------------------------------


def test_a_reader_uses_kept_digests_and_reads_no_weights(
    made: Slice, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.names("blk.1."))
    read = count_reading(monkeypatch)
    found = held_manifest(open_slice(made.folder))
    assert read == []
    assert {entry.name for entry in found.tensors} == set(whole.names("blk.1."))
    assert found.root == made.identity.provisional
    assert [entry.digest for entry in found.tensors] == [
        whole.digests[entry.name] for entry in found.tensors
    ]


def test_a_slice_that_somebody_wrote_to_is_read_again_and_once_only(
    made: Slice, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.names("blk.1."))
    (tensor,) = (t for t in whole.facts.tensors if t.name == "blk.1.ffn_up.weight")
    flip(made.facts.path, tensor.offset + 3)
    read = count_reading(monkeypatch)
    found = held_manifest(open_slice(made.folder))
    assert sum(read) == whole.facts.layer_bytes[1], "what is held, and no hole"
    assert {entry.name for entry in found.tensors} == {
        name for name in whole.names("blk.1.") if name != tensor.name
    }
    read.clear()
    assert held_manifest(open_slice(made.folder)).tensors == found.tensors
    assert read == []
    with SliceWriter(made.folder) as writer:
        assert writer.missing(whole.names("blk.1.")) == (
            Span(0, tensor.offset, tensor.offset + tensor.nbytes),
        )


@pytest.mark.parametrize("told", [True, False], ids=["times as they were", "times changed"])
def test_a_corrupt_byte_on_disk_is_found_when_all_is_verified(
    made: Slice, whole: Whole, told: bool
) -> None:
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.all_names)
    (tensor,) = (t for t in whole.facts.tensors if t.name == "blk.1.ffn_up.weight")
    times = made.facts.path.stat()
    flip(made.facts.path, tensor.offset + 3)
    if told:
        os.utime(made.facts.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with SliceWriter(made.folder, verify=True) as writer:
        assert [lost.name for lost in writer.lost] == [tensor.name]
    found = open_slice(made.folder)
    assert tensor.name not in held(made.folder)
    assert found.identity.root == whole.manifest.root, "it is the same model, less a tensor"
    with SliceWriter(made.folder) as writer:
        assert writer.lost == ()
        pull(writer, whole, whole.all_names)
    assert open_slice(made.folder).complete
    assert holds_the_right_bytes(open_slice(made.folder), whole)


def test_while_a_writer_is_at_work_what_is_held_is_believed(
    made: Slice, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.names("blk.1."))
        writer.save()
        (span,) = writer.missing(whole.names("blk.2."))
        writer.write(0, span.start, memoryview(whole.bytes_of(span))[:100])
        read = count_reading(monkeypatch)
        found = held_manifest(open_slice(made.folder))
        assert {entry.name for entry in found.tensors} == set(whole.names("blk.1."))
        assert read == []


def test_a_document_with_a_broken_seal_is_compared_with_the_bytes(
    made: Slice, whole: Whole
) -> None:
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.all_names)
    path = made.folder / "slice.cbor"
    digest = whole.digests["blk.1.ffn_up.weight"]
    damaged = bytes([digest[0] ^ 1]) + digest[1:]
    path.write_bytes(path.read_bytes().replace(digest, damaged))
    found = held_manifest(open_slice(made.folder))
    assert {entry.name for entry in found.tensors} == (
        set(whole.all_names) - {"blk.1.ffn_up.weight"}
    )
