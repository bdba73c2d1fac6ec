"""Models by name, found in folders."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshnode.errors import AmbiguousModel, ModelError, NoSuchModel
from meshnode.models import catalog as catalog_module
from meshnode.models.catalog import Catalog
from meshnode.models.facts import read_facts, shard_paths
from meshnode.models.manifest import digest_model
from tests.engine.synthetic import make_model


def small(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape: dict[str, Any] = {"layers": 1, "width": 32, "vocab": 260, "heads": 1, "ffn": 32}
    return make_model(path, **(shape | changes))


def scanned(*folders: Path) -> Catalog:
    catalog = Catalog(folders)
    catalog.scan()
    return catalog


def test_models_are_found_by_name_however_deep(tmp_path: Path) -> None:
    one = small(tmp_path / "glm-4.gguf")
    two = small(tmp_path / "hub" / "x" / "qwen.gguf", name="Qwen Big")
    (tmp_path / "notes.txt").write_text("no model")
    small(tmp_path / "mmproj-glm.gguf")
    catalog = scanned(tmp_path)
    assert [entry.name for entry in catalog.models()] == ["glm-4", "qwen"]
    assert catalog.resolve("glm-4") == one
    assert catalog.resolve("GLM-4") == one
    assert catalog.resolve("qwen big") == two


def test_shards_are_one_model(tmp_path: Path) -> None:
    first = small(tmp_path / "big.gguf", shards=3)
    second = small(tmp_path / "part.gguf", shards=2)
    shard_paths(second)[1].unlink()
    catalog = scanned(tmp_path)
    big, part = catalog.models()
    assert (big.name, big.path, big.complete, len(big.files)) == ("big", first, True, 3)
    assert big.size_bytes == sum(path.stat().st_size for path in shard_paths(first))
    assert (part.name, part.complete) == ("part", False)
    assert catalog.resolve(str(shard_paths(first)[2])) == first


def test_a_path_wins_and_need_not_be_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small(tmp_path / "m.gguf")
    assert Catalog().resolve(str(path)) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Catalog().resolve("~/m.gguf") == path


def test_one_file_behind_several_links_is_one_model(tmp_path: Path) -> None:
    blob = small(tmp_path / "blobs" / "abc")
    for snapshot in ("1", "2"):
        folder = tmp_path / "hub" / snapshot
        folder.mkdir(parents=True)
        (folder / "glm.gguf").symlink_to(blob)
    catalog = scanned(tmp_path / "hub")
    assert [entry.path.name for entry in catalog.models()] == ["glm.gguf"]


def test_a_loop_of_folders_ends(tmp_path: Path) -> None:
    small(tmp_path / "a" / "m.gguf")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert len(scanned(tmp_path).models()) == 1


def test_very_deep_and_very_many_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path / "/".join("d" * 12) / "deep.gguf")
    assert scanned(tmp_path).models() == ()
    monkeypatch.setattr(catalog_module, "MAX_MODELS", 2)
    for n in range(4):
        (tmp_path / f"m{n}.gguf").write_bytes(b"GGUF")
    assert len(scanned(tmp_path).models()) == 2
    monkeypatch.setattr(catalog_module, "MAX_FOLDERS", 0)
    assert scanned(tmp_path).models() == ()


def test_an_impossible_shard_name_and_a_vanished_folder_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x-00009-of-00002.gguf").write_bytes(b"GGUF")
    (tmp_path / "sub").mkdir()
    real = os.scandir

    def gone(folder: Path) -> object:
        if Path(folder).name == "sub":
            raise PermissionError(13, "no")
        return real(folder)

    monkeypatch.setattr(os, "scandir", gone)
    assert scanned(tmp_path).models() == ()


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        scanned(tmp_path / "gone")


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    for text in ("./gone.gguf", "gone.gguf", "/a/b"):
        with pytest.raises(ModelError, match="there is no file"):
            Catalog().resolve(text)


def test_an_unknown_name_is_answered_with_near_ones(tmp_path: Path) -> None:
    for name in ("glm-4-9b-q4", "qwen2-7b", "mistral"):
        (tmp_path / f"{name}.gguf").write_bytes(b"no header")
    catalog = scanned(tmp_path)
    with pytest.raises(NoSuchModel, match="did you mean glm-4-9b-q4"):
        catalog.resolve("glm")
    with pytest.raises(NoSuchModel, match=r"did you mean mistral\?"):
        catalog.resolve("mistrol")
    with pytest.raises(NoSuchModel, match="there are glm-4-9b-q4, mistral, qwen2-7b"):
        catalog.resolve("zzzzzz")
    with pytest.raises(NoSuchModel, match="no folder with models is known"):
        Catalog().resolve("glm")


def test_two_models_of_one_name_are_not_guessed_between(tmp_path: Path) -> None:
    small(tmp_path / "a" / "m.gguf")
    small(tmp_path / "b" / "m.gguf", seed=1)
    with pytest.raises(AmbiguousModel, match="several models are named 'm': give one by path"):
        scanned(tmp_path).resolve("m")


def test_a_title_that_is_no_text_is_no_title(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path / "m.gguf")
    catalog = scanned(tmp_path)
    header = SimpleNamespace(metadata={"general.name": 7})
    monkeypatch.setattr(catalog_module, "read_header", lambda path: header)
    with pytest.raises(NoSuchModel):
        catalog.resolve("7")


def test_models_that_may_hold_what_is_wanted_come_the_likeliest_first(tmp_path: Path) -> None:
    wanted = digest_model(read_facts(small(tmp_path / "w" / "wanted.gguf", layers=3))).tensors
    folder = tmp_path / "here"
    small(folder / "less.gguf", layers=1)
    small(folder / "same.gguf", layers=3, seed=2)
    small(folder / "alien.gguf", width=64)
    (folder / "broken.gguf").write_bytes(b"GGUF")
    found = scanned(folder).holding(wanted)
    assert [facts.path.stem for facts in found][:2] == ["same", "less"]
    assert "broken" not in [facts.path.stem for facts in found]


def test_a_model_removed_while_it_is_looked_at_is_told_as_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mesh models rm` and gc run beside a node."""
    first = small(tmp_path / "part.gguf", shards=2)
    shard_paths(first)[1].unlink()
    monkeypatch.setattr(os.path, "isfile", lambda _: True)  # it was, a moment ago
    (entry,) = scanned(tmp_path).models()
    assert (entry.complete, entry.files) == (False, (first,))
