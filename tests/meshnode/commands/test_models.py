"""`mesh models`: what lies here, what is in it, and whether it is sound."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from meshnode.models.slice_mark import SLICE_DOCUMENT
from meshnode.models.store.slice import Slice, in_use, open_slice
from meshnode.models.store.thinning import note_needed
from meshnode.models.store.writer import SliceWriter
from tests.engine.synthetic import make_model
from tests.meshnode.commands.lines import Mesh, told
from tests.meshnode.models.store.slices import SOURCE, Whole, make_whole, pull

USAGE, MODEL = 2, 6
DAMAGED_TENSOR = "blk.1.ffn_up.weight"


def flip(path: Path, whole: Whole) -> None:
    """A disk that rots: a byte is another one, and nothing tells of it."""
    (tensor,) = (t for t in whole.facts.tensors if t.name == DAMAGED_TENSOR)
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(tensor.offset)
        (byte,) = file.read(1)
        file.seek(tensor.offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


# -- the list -------------------------------------------------------------------------------------


def test_where_nothing_is_it_says_what_to_do(mesh: Mesh, tmp_path: Path) -> None:
    code, out, _ = mesh("models")
    assert code == 0
    assert "no models in" in out
    assert "--models FOLDER" in out
    assert told(mesh, "models") == {"models": []}
    assert not (tmp_path / "home").exists(), "a question makes nothing"


def test_slices_and_models_are_listed_with_what_is_here(
    mesh: Mesh, made: Slice, whole: Whole
) -> None:
    code, out, _ = mesh("models", "--models", whole.facts.path.parent)
    assert code == 0
    titles, part, all_of_it = (line.split("  ") for line in out.splitlines())
    assert titles[0].strip() == "name"
    assert str(made.folder) in "".join(part)
    assert SOURCE in "".join(part)
    assert "all" in all_of_it
    rows = told(mesh, "models", "--models", whole.facts.path.parent)["models"]
    assert [(row["slice"], row["complete"]) for row in rows] == [(True, False), (False, True)]
    assert rows[0]["held_bytes"] == whole.facts.layer_bytes[1]
    assert rows[0]["source"] == SOURCE
    assert {row["size_bytes"] for row in rows} == {whole.facts.path.stat().st_size}


def test_a_link_into_a_slice_is_that_slice_and_no_model_that_is_all_here(
    mesh: Mesh, made: Slice, tmp_path: Path
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    link = links / "a.gguf"
    link.symlink_to(made.facts.path)
    (made.folder.parent / "b.gguf").symlink_to(made.facts.path)  # is found before it
    for place in ([], ["--models", links]):
        (row,) = told(mesh, "models", *place)["models"]
        assert (row["name"], row["complete"]) == ("m", False)
        assert row["path"] == str(made.facts.path)
    assert told(mesh, "models", "info", link)["held_tensors"] == len(made.held)
    assert told(mesh, "models", "verify", link)["tensors"] == len(made.held)
    with in_use([link]):
        assert mesh("models", "rm", "m")[0] == MODEL


def test_a_damaged_slice_is_listed_as_such_and_can_go(mesh: Mesh, made: Slice) -> None:
    (made.folder / SLICE_DOCUMENT).write_bytes(b"noise")
    _, out, _ = mesh("models")
    assert "damaged" in out
    (row,) = told(mesh, "models")["models"]
    assert "mesh models rm m" in row["trouble"]
    assert mesh("models", "info", "m")[0] == MODEL
    assert told(mesh, "models", "rm", "m")["freed_bytes"] > 0
    assert told(mesh, "models") == {"models": []}


def test_a_file_whose_name_a_terminal_would_obey_is_shown_in_one_line_without_that(
    mesh: Mesh, tmp_path: Path
) -> None:
    folder = tmp_path / "of\x1b[31m others"
    folder.mkdir()
    odd = make_model(folder / "a\x1b]0;pwned\x07\nb.gguf")
    code, out, _ = mesh("models", "--models", folder)
    assert (code, len(out.splitlines())) == (0, 2)
    for asked in ([], ["info", odd], ["verify", odd], ["info", folder / "none\x1b[2J.gguf"]):
        _, out, complaint = mesh("models", *asked, "--models", folder)
        assert not any(char in out + complaint for char in "\x1b\x07"), asked
    (row,) = told(mesh, "models", "--models", folder)["models"]
    assert row["path"] == str(odd), "programs get it as it is"


def test_a_folder_that_is_not_there_is_told(mesh: Mesh, tmp_path: Path) -> None:
    code, _, complaint = mesh("models", "--models", tmp_path / "gone")
    assert code == MODEL
    assert "there is no folder" in complaint


def test_options_before_the_command_are_refused(mesh: Mesh) -> None:
    code, _, complaint = mesh("models", "--json", "gc", "--keep", "1G")
    assert code == USAGE
    assert "give options after the command: mesh models gc" in complaint


# -- info -----------------------------------------------------------------------------------------


def test_info_tells_what_the_header_says(mesh: Mesh, made: Slice, whole: Whole) -> None:
    code, out, _ = mesh("models", "info", "m")
    assert code == 0
    for text in ("llama", "provisional", "chat template", "a token at f16", SOURCE):
        assert text in out
    facts = told(mesh, "models", "info", "m")
    assert facts["layers"] == 3
    assert facts["weight_bytes"] == whole.facts.weight_bytes
    assert facts["held_tensors"] == len(whole.names("blk.1."))
    assert facts["provisional"] == made.identity.provisional
    assert facts["root"] is None
    sizes = facts["bytes"]
    assert (
        sum(sizes["layers"]) + sizes["embedding"] + sizes["output"] + sizes["other"]
        == (facts["weight_bytes"])
    )


def test_info_tells_what_no_plan_needs_any_more(mesh: Mesh, made: Slice, whole: Whole) -> None:
    assert told(mesh, "models", "info", "m")["unneeded_bytes"] == 0
    note_needed(made.facts.files, whole.names("blk.0."))
    assert told(mesh, "models", "info", "m")["unneeded_bytes"] == made.held_bytes
    assert "that no plan needs any more" in mesh("models", "info", "m")[1]


def test_info_of_a_tied_mixture_in_shards(mesh: Mesh, tmp_path: Path) -> None:
    whole = make_whole(tmp_path / "moe", experts=4, tied=True, shards=2)
    _, out, _ = mesh("models", "info", whole.facts.path)
    assert "experts" in out
    assert "4, of which a token uses 2" in out
    assert "and 1 more" in out
    assert "the embedding again" in out
    assert "not known until" in out


def test_a_name_that_is_none_is_answered_with_near_ones(mesh: Mesh, made: Slice) -> None:
    code, _, complaint = mesh("models", "info", "n")
    assert code == MODEL
    assert "no model is named 'n'" in complaint


# -- verify ---------------------------------------------------------------------------------------


def test_a_corrupt_byte_in_a_slice_is_named_dropped_and_pulled_again(
    mesh: Mesh, made: Slice, whole: Whole
) -> None:
    code, out, _ = mesh("models", "verify", "m")
    assert (code, "all as they were" in out) == (0, True)
    flip(made.facts.path, whole)
    code, _, complaint = mesh("models", "verify", "m")
    assert code == MODEL
    assert DAMAGED_TENSOR in complaint
    assert "pulled again" in complaint
    held = {tensor.name for tensor in open_slice(made.folder).held}
    assert held == set(whole.names("blk.1.")) - {DAMAGED_TENSOR}
    assert told(mesh, "models", "verify", "m")["wrong"] == []
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.names("blk.1."))
    assert told(mesh, "models", "verify", "m")["tensors"] == len(whole.names("blk.1."))


def test_a_corrupt_byte_in_a_file_is_named(mesh: Mesh, whole: Whole) -> None:
    path = whole.facts.path
    assert told(mesh, "models", "verify", path)["compared_with"] == "nothing"
    assert told(mesh, "models", "verify", path)["compared_with"] == "digests kept"
    assert told(mesh, "models", "info", path)["root"] == whole.manifest.root
    flip(path, whole)
    code, _, complaint = mesh("models", "verify", path)
    assert code == MODEL
    assert DAMAGED_TENSOR in complaint
    assert "download or copy" in complaint
    assert told(mesh, "models", "info", path)["root"] != whole.manifest.root, (
        "it is another model now"
    )


def test_a_blob_is_compared_with_the_sha256_it_is_named_after(
    mesh: Mesh, whole: Whole, tmp_path: Path
) -> None:
    data = whole.facts.path.read_bytes()
    blob = tmp_path / "blobs" / hashlib.sha256(data).hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(data)
    (tmp_path / "link.gguf").symlink_to(blob)
    assert told(mesh, "models", "verify", tmp_path / "link.gguf")["compared_with"] == (
        "sha256 in the file's name"
    )
    flip(blob, whole)
    code, out, complaint = mesh("models", "verify", tmp_path / "link.gguf", "--json")
    assert code == MODEL
    assert json.loads(out)["wrong"] == ["link.gguf", DAMAGED_TENSOR]
    assert "link.gguf" in complaint


def test_what_is_written_to_is_not_verified(mesh: Mesh, made: Slice) -> None:
    with SliceWriter(made.folder):
        code, _, complaint = mesh("models", "verify", "m")
    assert code == MODEL
    assert "being written to" in complaint
