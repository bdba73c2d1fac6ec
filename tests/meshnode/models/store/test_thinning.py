"""What a plan does not need any more is given back, and nothing that anybody needs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import cbor2
import pytest
from blake3 import blake3

from meshnode.errors import DiskFull
from meshnode.models.slice_mark import SLICE_DOCUMENT
from meshnode.models.store import disk, thinning
from meshnode.models.store import writer as writer_module
from meshnode.models.store.disk import allocated_bytes
from meshnode.models.store.document import DIGEST_BYTES, parse_untrusted, to_bytes
from meshnode.models.store.locks import USE_LOCK, SliceInUse, last_used_ns
from meshnode.models.store.slice import Slice, is_as_told, open_slice
from meshnode.models.store.store import Store
from meshnode.models.store.thinning import (
    NoRoomBack,
    annotate,
    drop_tensors,
    note_needed,
    thin,
    unneeded,
)
from meshnode.models.store.writer import SliceWriter
from tests.meshnode.models.store.slices import Whole, holds_the_right_bytes, make_whole, pull
from tests.power_loss import Disk, after_power_cuts


@pytest.fixture
def whole(tmp_path: Path) -> Whole:
    return make_whole(tmp_path / "source", width=128, ffn=256)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def filled(store: Store, whole: Whole, *parts: str, version: int = 1) -> Slice:
    """Used at that second of 1970."""
    made = whole.create(store, f"etag:{version}")
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.names(*parts))
    os.utime(made.folder / USE_LOCK, (version, version))
    return open_slice(made.folder)


def planned(part: Slice, whole: Whole, *parts: str) -> Slice:
    note_needed(part.facts.files, whole.names(*parts))
    return open_slice(part.folder)


# -- what is needed -------------------------------------------------------------------------------


def test_what_the_last_plan_left_out_is_not_needed(store: Store, whole: Whole) -> None:
    part = filled(store, whole, "blk.0.", "blk.1.")
    assert unneeded(part) == (), "no plan has been made"
    part = planned(part, whole, "blk.1.", "blk.2.")
    assert set(unneeded(part)) == set(whole.names("blk.0."))
    assert is_as_told(part), "nothing has to be read again"
    assert unneeded(planned(part, whole, "blk.0.", "blk.1.")) == ()


def test_what_was_pulled_since_is_needed(store: Store, whole: Whole) -> None:
    part = planned(filled(store, whole, "blk.0."), whole, "blk.1.")
    with SliceWriter(part.folder) as writer:
        pull(writer, whole, whole.names("output_norm"))
    assert set(unneeded(open_slice(part.folder))) == set(whole.names("blk.0."))


def test_a_model_that_is_all_here_stays_whole(store: Store, whole: Whole) -> None:
    part = planned(filled(store, whole, ""), whole, "blk.0.")
    assert part.complete
    assert unneeded(part) == ()


def test_a_document_of_an_older_mesh_tells_of_no_plan(store: Store, whole: Whole) -> None:
    part = filled(store, whole, "blk.0.")
    data = (part.folder / SLICE_DOCUMENT).read_bytes()
    magic = data[: data.index(b"\n") + 1]
    fields = cbor2.loads(data[len(magic) + DIGEST_BYTES :])
    assert fields.pop("needed", 0) is None
    body = cbor2.dumps(fields)
    old = parse_untrusted(magic + blake3(body).digest() + body)
    assert old.sealed
    assert old == part.document
    noted = replace(old, needed=frozenset({"a"}))
    assert parse_untrusted(to_bytes(noted)) == noted


def test_nothing_is_noted_where_somebody_writes_or_a_disk_did(store: Store, whole: Whole) -> None:
    part = filled(store, whole, "blk.0.")
    with SliceWriter(part.folder):
        note_needed(part.facts.files, whole.names("blk.1."))
    assert open_slice(part.folder).document.needed is None
    path = part.folder / SLICE_DOCUMENT
    data = path.read_bytes()
    path.write_bytes(data.replace(b"etag:1", b"etag:2"))
    damaged = path.read_bytes()
    annotate(part.folder, lambda document: replace(document, needed=frozenset()))
    assert path.read_bytes() == damaged, "a claim is not sealed"
    note_needed([part.folder / "gone" / "m.gguf", whole.facts.path], [])
    assert not (whole.facts.path.parent / SLICE_DOCUMENT).exists()


# -- given back -----------------------------------------------------------------------------------


def test_what_is_not_needed_goes_before_any_slice_does(store: Store, whole: Whole) -> None:
    old = planned(filled(store, whole, "blk.0.", "blk.1.", version=1), whole, "blk.0.")
    new = planned(filled(store, whole, "blk.0.", "blk.1.", version=2), whole, "blk.1.")
    total_bytes = sum(map(allocated_bytes, store.folders()))
    found = store.collect(total_bytes - 1)
    assert [one.name for one in found.thinned] == [old.folder.name], "one was enough"
    assert found.removed == ()
    assert found.left_bytes == sum(map(allocated_bytes, store.folders())) < total_bytes
    assert {t.name for t in open_slice(old.folder).held} == set(whole.names("blk.0."))
    assert holds_the_right_bytes(open_slice(old.folder), whole)
    found = store.collect(1)
    assert [one.name for one in found.thinned] == [new.folder.name]
    assert [one.name for one in found.removed] == [old.folder.name, new.folder.name]


def test_to_drop_is_not_to_use(store: Store, whole: Whole) -> None:
    part = planned(filled(store, whole, "blk.0.", "blk.1.", version=7), whole, "blk.0.")
    assert thin(part.folder) > 0
    assert last_used_ns(part.folder) == 7 * 10**9
    assert thin(part.folder) == 0, "there is no more of it"


def test_what_is_in_use_is_left_alone(store: Store, whole: Whole) -> None:
    part = planned(filled(store, whole, "blk.0.", "blk.1."), whole, "blk.0.")
    with part.use():
        assert thin(part.folder) == 0
        with pytest.raises(SliceInUse):
            drop_tensors(part.folder, whole.names("blk.1."))
        assert store.collect(0).in_use == (part.folder.name,)
    assert open_slice(part.folder).held == part.held
    with SliceWriter(part.folder):
        assert thin(part.folder) == 0


def test_where_no_room_comes_back_nothing_is_dropped(
    store: Store, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = planned(filled(store, whole, "blk.0.", "blk.1."), whole, "blk.0.")
    monkeypatch.setattr(disk, "_fallocate", None)
    with pytest.raises(NoRoomBack, match="mesh models rm m"):
        drop_tensors(part.folder, whole.names("blk.1."))
    assert thin(part.folder) == 0
    assert open_slice(part.folder).held == part.held
    assert not list(part.folder.glob(".punch*"))


def test_on_a_full_disk_whole_slices_go_instead(
    store: Store, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = planned(filled(store, whole, "blk.0.", "blk.1."), whole, "blk.0.")

    def full(*_: object) -> None:
        raise DiskFull("no space left")

    monkeypatch.setattr(writer_module, "save", full)
    found = store.collect(0)
    assert found.thinned == ()
    assert [one.name for one in found.removed] == [part.folder.name]


def test_a_slice_that_cannot_be_read_is_left_to_whoever_looks_after_it(
    store: Store, whole: Whole
) -> None:
    part = filled(store, whole, "blk.0.")
    (part.folder / SLICE_DOCUMENT).write_bytes(b"noise")
    assert thin(part.folder) == 0
    assert thin(store.folder / "gone") == 0


def test_weights_that_have_rotted_are_not_made_zeros_under_who_reads_them(
    store: Store, whole: Whole
) -> None:
    part = filled(store, whole, "blk.0.", "blk.1.")
    rotten = next(t for t in part.held if t.name == "blk.1.ffn_up.weight")
    with part.facts.path.open("r+b") as file:
        file.seek(rotten.offset)
        file.write(b"rot")
    with part.use(), SliceWriter(part.folder) as writer:
        assert writer.lost == (rotten,)
        with part.facts.path.open("rb") as file:
            file.seek(rotten.offset)
            assert file.read(3) == b"rot", "an engine may have it in its memory by way of the file"
        assert rotten.name not in {tensor.name for tensor in open_slice(part.folder).held}
    with SliceWriter(part.folder) as writer:
        pull(writer, whole, [rotten.name])
    assert holds_the_right_bytes(open_slice(part.folder), whole)


# -- the power goes -------------------------------------------------------------------------------


def test_a_power_cut_at_any_step_leaves_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole is written as zeros here, so that it may reach the disk at any moment, or never."""

    def punch(fd: int, start: int, stop: int) -> bool:
        os.pwrite(fd, bytes(stop - start), start)
        return True

    whole = make_whole(tmp_path / "source", layers=2, width=32, vocab=260, heads=1, ffn=32)
    part = filled(Store(tmp_path / "models"), whole, "blk.0.attn", "blk.1.attn")
    monkeypatch.setattr(writer_module, "punch_hole", punch)
    monkeypatch.setattr(thinning, "can_punch", lambda _: True)
    stage = Disk(part.folder)
    with stage.watched():
        note_needed(part.facts.files, whole.names("blk.0.attn"))
        stage.tell("noted")
        assert thin(part.folder) >= 0
        stage.tell("dropped")
    stage.close()
    count = 0
    for found in after_power_cuts(stage, tmp_path):
        left = open_slice(found.folder)
        held = {tensor.name for tensor in left.held}
        assert set(whole.names("blk.0.attn")) <= held
        assert ("noted" in found.told) <= (left.document.needed is not None)
        assert ("dropped" in found.told) <= (held == set(whole.names("blk.0.attn")))
        with SliceWriter(found.folder) as writer:
            assert writer.lost == (), f"told to be held, and zeros: {found.told}"
            pull(writer, whole, whole.all_names)
        assert open_slice(found.folder).facts.path.read_bytes() == whole.facts.path.read_bytes()
        count += 1
    assert count > 10
