"""A writer on a disk that is full or refuses, and one that goes on where another was cut short."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from meshnode.errors import DiskFull, ModelError
from meshnode.models import manifest as manifest_module
from meshnode.models.spans import Span
from meshnode.models.store import writer as writer_module
from meshnode.models.store.journal import JOURNAL_NAME
from meshnode.models.store.slice import Slice, open_slice, save
from meshnode.models.store.writer import SliceWriter
from tests.meshnode.models.store.slices import (
    Whole,
    held,
    holds_the_right_bytes,
    pull,
)

# -- full disks -----------------------------------------------------------------------------------


def test_a_limit_on_file_size_is_told_and_what_was_done_stays(made: Slice, whole: Whole) -> None:
    first = whole.names("token_embd")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, first)
        (span,) = writer.missing(["output.weight"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (span.start + 10, before[1]))
        try:
            with pytest.raises(DiskFull, match="what was pulled so far stays"):
                pull(writer, whole, ["output.weight"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert writer.save().held
    assert held(made.folder) == set(first)
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.all_names)
    assert holds_the_right_bytes(open_slice(made.folder), whole)


@pytest.mark.parametrize("place", ["fdatasync", "fsync", "replace"])
def test_a_disk_that_is_full_at_any_place_costs_nothing_that_was_held(
    made: Slice, whole: Whole, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    first, second = whole.names("blk.0."), whole.names("blk.1.")
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, first)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill_the_disk() -> None:
        with SliceWriter(made.folder) as writer:
            monkeypatch.setattr(os, place, full)
            pull(writer, whole, second)

    with pytest.raises(DiskFull):
        fill_the_disk()
    monkeypatch.undo()
    assert set(first) <= held(made.folder)
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, [*first, *second])
    assert held(made.folder) == {*first, *second}
    assert holds_the_right_bytes(open_slice(made.folder), whole)


def test_a_disk_that_cannot_be_written_is_a_sentence(
    made: Slice, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with SliceWriter(made.folder) as writer, monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", broken)
        with pytest.raises(ModelError, match="cannot be written: Input/output error"):
            pull(writer, whole, whole.names("blk.0."))


# -- unfinished -----------------------------------------------------------------------------------


def test_what_was_done_of_an_unfinished_tensor_is_not_pulled_again(
    made: Slice, whole: Whole
) -> None:
    (tensor,) = (t for t in whole.facts.tensors if t.name == "token_embd.weight")
    half = Span(0, tensor.offset, tensor.offset + tensor.nbytes // 2)
    with SliceWriter(made.folder) as writer:
        writer.write(0, half.start, memoryview(whole.bytes_of(half)))
        writer.done(0, half.start, half.stop)
    assert (made.folder / JOURNAL_NAME).stat().st_size > 0
    assert held(made.folder) == set()
    with SliceWriter(made.folder) as writer:
        rest = Span(0, half.stop, tensor.offset + tensor.nbytes)
        assert writer.missing([tensor.name]) == (rest,)
        pull(writer, whole, [tensor.name])
    assert (made.folder / JOURNAL_NAME).stat().st_size == 0
    assert holds_the_right_bytes(open_slice(made.folder), whole)


def test_files_put_back_from_a_backup_are_not_taken_for_those_of_the_journal(
    made: Slice, whole: Whole
) -> None:
    (tensor,) = (t for t in whole.facts.tensors if t.name == "token_embd.weight")
    half = Span(0, tensor.offset, tensor.offset + tensor.nbytes // 2)
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.names("blk.1."))
        writer.write(0, half.start, memoryview(whole.bytes_of(half)))
        writer.done(0, half.start, half.stop)
    copy = made.folder.parent / "copy"
    data = bytearray(made.facts.path.read_bytes())
    data[half.start : half.stop] = bytes(half.size_bytes)
    copy.write_bytes(data)
    copy.rename(made.facts.path)
    with SliceWriter(made.folder) as writer:
        assert writer.missing([tensor.name])[0].start == tensor.offset
    assert held(made.folder) == set(whole.names("blk.1.")), "that was read again"


def test_the_document_is_not_written_for_every_tensor(
    made: Slice, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []

    def counted(folder: Path, document: object) -> None:
        saved.append(1)
        save(folder, document)  # type: ignore[arg-type]

    monkeypatch.setattr(writer_module, "save", counted)
    with SliceWriter(made.folder) as writer:
        for name in whole.all_names:
            pull(writer, whole, [name])
    assert len(saved) == 1
    assert open_slice(made.folder).complete


def test_large_tensors_are_held_soon(
    made: Slice, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SAVE_EVERY_BYTES", 1)
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.names("blk.1."))
        assert held(made.folder) == set(whole.names("blk.1."))


def test_digests_are_read_in_pieces(
    made: Slice, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "READ_BYTES", 1000)
    with SliceWriter(made.folder, whole.digests) as writer:
        pull(writer, whole, whole.all_names)
    assert open_slice(made.folder).complete
