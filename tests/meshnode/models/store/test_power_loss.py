"""Power cuts at any step of a pull: what was told to be held is there, whole and right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshnode.models.store.slice import held_manifest, open_slice
from meshnode.models.store.store import Store
from meshnode.models.store.writer import SliceWriter
from tests.meshnode.models.store.slices import Whole, make_whole, pull
from tests.power_loss import Disk, after_power_cuts

PARTS = ("blk.0.attn", "blk.0.ffn")


@pytest.fixture
def whole(tmp_path: Path) -> Whole:
    return make_whole(tmp_path / "source", layers=1, width=32, vocab=260, heads=1, ffn=32)


def pulled(tmp_path: Path, whole: Whole) -> tuple[Disk, Path]:
    """A disk on which two parts were pulled and told of, and the first one dropped again."""
    made = whole.create(Store(tmp_path / "models"))
    disk = Disk(made.folder)
    with disk.watched():
        with SliceWriter(made.folder) as writer:
            for part in PARTS:
                pull(writer, whole, whole.names(part))
                writer.save()
                disk.tell(part)
            writer.drop(whole.names(PARTS[0]))
            disk.tell("dropped")
        disk.tell("closed")
    disk.close()
    return disk, made.folder


def check(disk: Disk, tmp_path: Path, whole: Whole) -> int:
    count = 0
    for found in after_power_cuts(disk, tmp_path):
        held = {entry.name for entry in held_manifest(open_slice(found.folder)).tensors}
        for part in PARTS:
            if part in found.told and not (part == PARTS[0] and "ffn" in str(found.told)):
                assert set(whole.names(part)) <= held, f"told {found.told}"
        if "dropped" in found.told:
            assert not set(whole.names(PARTS[0])) & held
        with SliceWriter(found.folder) as writer:
            pull(writer, whole, whole.all_names)
        assert open_slice(found.folder).facts.path.read_bytes() == whole.facts.path.read_bytes()
        count += 1
    return count


def test_after_a_power_cut_what_was_told_is_held_and_the_rest_can_be_pulled(
    tmp_path: Path, whole: Whole
) -> None:
    disk, _ = pulled(tmp_path, whole)
    assert check(disk, tmp_path, whole) > 30


def test_without_its_flush_a_power_cut_is_seen_to_lose_a_tensor(
    tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    disk, _ = pulled(tmp_path, whole)
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="told"):
        check(disk, tmp_path, whole)
