"""`mesh models rm` and `gc`: away with it, and with nothing else."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from meshnode.models.slice_mark import SLICE_DOCUMENT
from meshnode.models.store.slice import Slice, open_slice
from meshnode.models.store.store import Store
from meshnode.models.store.thinning import note_needed
from meshnode.models.store.writer import SliceWriter
from tests.meshnode.commands.lines import Mesh, told
from tests.meshnode.models.store.slices import Whole, make_whole, pull

USAGE, MODEL = 2, 6


def test_a_slice_is_removed_but_not_while_it_is_used(mesh: Mesh, made: Slice) -> None:
    with made.use():
        code, _, complaint = mesh("models", "rm", "m")
    assert code == MODEL
    assert "being used" in complaint
    code, out, _ = mesh("models", "rm", "m")
    assert (code, "are free again" in out) == (0, True)
    assert not made.folder.exists()


def test_two_of_one_name_are_told_apart_by_folder(
    mesh: Mesh, made: Slice, store: Store, whole: Whole
) -> None:
    other = whole.create(store, "etag:2")
    assert mesh("models", "rm", other.folder.name)[0] == 0
    again = whole.create(store, "etag:3")
    assert mesh("models", "rm", "M")[0] == MODEL
    assert again.folder.exists()
    assert made.folder.exists()


def test_a_damaged_slice_goes_by_its_files_name_too_and_not_while_it_is_used(
    mesh: Mesh, store: Store, whole: Whole
) -> None:
    other = whole.create(store)
    other.folder.rename(store.folder / "elsewhere")
    found = open_slice(store.folder / "elsewhere")
    with found.use():
        (found.folder / SLICE_DOCUMENT).write_bytes(b"noise")
        assert mesh("models", "rm", "m")[0] == MODEL
        assert found.facts.path.exists()
    assert mesh("models", "rm", "m")[0] == 0
    assert not found.folder.exists()


def test_a_whole_file_in_the_own_folder_is_removed(mesh: Mesh, store: Store) -> None:
    folder = store.folder / "mine"
    make_whole(folder, shards=2)
    assert mesh("models", "rm", "m")[0] == 0
    assert not folder.exists()


def test_files_elsewhere_are_never_removed(
    mesh: Mesh, store: Store, whole: Whole, tmp_path: Path
) -> None:
    code, _, complaint = mesh("models", "rm", whole.facts.path)
    assert (code, whole.facts.path.exists()) == (MODEL, True)
    assert "only read" in complaint
    (store.folder / "linked").symlink_to(whole.facts.path.parent)
    code, _, complaint = mesh("models", "rm", "m")
    assert code == MODEL
    assert "leads out of" in complaint
    assert whole.facts.path.exists()
    (store.folder / "linked").unlink()
    (store.folder / "m.gguf").symlink_to(whole.facts.path)
    assert mesh("models", "rm", "m")[0] == 0
    assert whole.facts.path.exists(), "the link goes, what it leads to stays"


def test_gc_keeps_what_it_is_told_to(mesh: Mesh, made: Slice, store: Store, whole: Whole) -> None:
    other = whole.create(store, "etag:2")
    code, out, _ = mesh("models", "gc", "--keep", "1G")
    assert (code, "removed" in out) == (0, False)
    with other.use():
        code, out, _ = mesh("models", "gc", "--keep", "0")
    assert code == 0
    assert "m is removed" in out
    assert f"{other.folder.name} is in use and stays" in out
    assert not made.folder.exists()
    found = told(mesh, "models", "gc", "--keep", "0")
    assert [row["name"] for row in found["removed"]] == [other.folder.name]
    assert found["left_bytes"] == 0
    assert mesh("models", "gc", "--keep", "much")[0] == USAGE


def test_gc_goes_on_past_what_is_gone_and_past_what_it_may_not_remove(
    mesh: Mesh, made: Slice, store: Store, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = whole.create(store, "etag:kept").folder
    listed = [*store.folders(), store.folder / "gone-since"]
    rename = Path.rename

    def refuse_one(path: Path, target: Path) -> Path:
        if path == kept:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return rename(path, target)

    monkeypatch.setattr(Store, "folders", lambda _: listed)
    monkeypatch.setattr(Path, "rename", refuse_one)
    code, out, complaint = mesh("models", "gc", "--keep", "0")
    assert (code, kept.exists(), made.folder.exists()) == (MODEL, True, False)
    assert "m is removed" in out
    assert f"{kept} cannot be written: Operation not permitted" in complaint


def test_some_layers_of_a_slice_are_removed(mesh: Mesh, store: Store, tmp_path: Path) -> None:
    large = make_whole(tmp_path / "large", layers=4, width=256, ffn=512)
    part = large.create(store)
    with SliceWriter(part.folder) as writer:
        pull(writer, large, large.all_names)
    freed = told(mesh, "models", "rm", "m", "--layers", "1:2")["freed_bytes"]
    assert freed >= sum(large.facts.layer_bytes[1:3]) - 16384
    left = {tensor.name for tensor in open_slice(part.folder).held}
    assert left == set(large.all_names) - set(large.names("blk.1.", "blk.2."))
    code, out, _ = mesh("models", "rm", "m", "--layers", "3:output")
    assert (code, "layers 3:output of m are removed" in out) == (0, True)
    left = {tensor.name for tensor in open_slice(part.folder).held}
    assert left == set(large.names("blk.0.", "token_embd"))
    code, out, _ = mesh("models", "rm", "m", "--layers", "3:output")
    assert (code, "0 B are free again" in out) == (0, True)


@pytest.mark.parametrize("layers", ["3:1", "all", "0:9", "", "-1"])
def test_layers_that_are_none_are_not_removed(mesh: Mesh, made: Slice, layers: str) -> None:
    code, _, complaint = mesh("models", "rm", "m", f"--layers={layers}")
    assert code == USAGE
    assert "--layers" in complaint
    assert open_slice(made.folder).held == made.held


def test_layers_are_removed_of_a_slice_alone_and_not_while_it_is_used(
    mesh: Mesh, made: Slice, store: Store
) -> None:
    with made.use():
        code, _, complaint = mesh("models", "rm", "m", "--layers", "1")
    assert (code, "being used" in complaint) == (MODEL, True)
    make_whole(store.folder / "file").facts.path.rename(store.folder / "file" / "whole.gguf")
    code, _, complaint = mesh("models", "rm", "whole", "--layers", "0")
    assert (code, "goes as a whole" in complaint) == (MODEL, True)
    assert (store.folder / "file" / "whole.gguf").exists()


def test_gc_drops_what_no_plan_needs_first(mesh: Mesh, store: Store, tmp_path: Path) -> None:
    large = make_whole(tmp_path / "large", layers=4, width=256, ffn=512)
    parts = [large.create(store, f"etag:{number}") for number in range(2)]
    for part in parts:
        with SliceWriter(part.folder) as writer:
            pull(writer, large, large.names("blk.0.", "blk.1."))
        note_needed(part.facts.files, large.names("blk.0."))
    left_bytes = told(mesh, "models", "gc", "--keep", "1G")["left_bytes"]
    found = told(mesh, "models", "gc", "--keep", f"{left_bytes // 1024 - 8}K")
    (thinned,) = found["thinned"]
    assert thinned["freed_bytes"] >= large.facts.layer_bytes[1] - 16384
    assert (found["removed"], found["in_use"]) == ([], [])
    code, out, _ = mesh("models", "gc", "--keep", "1K")
    assert (code, out.count("any more is dropped: ")) == (0, 1)
    assert out.count(" is removed: ") == 2
