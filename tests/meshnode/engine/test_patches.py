from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from meshnode.engine import patch_tree
from meshnode.engine.errors import PatchFailed
from meshnode.engine.patches import apply_series, engine_key_of, read_series
from meshnode.errors import UsageError
from tests.conftest import require
from tests.meshnode.engine import fake_llama
from tests.meshnode.engine.conftest import Fake


def quiet(done: int, total: int, line: str) -> None:
    pass


def path_with_only(tool: str | None, folder: Path) -> str:
    """A PATH on which `tool` is the only program."""
    folder.mkdir()
    if tool is not None:
        found = shutil.which(tool)
        require("compiler", found is not None, f"no {tool} here")
        (folder / tool).symlink_to(str(found))
    return str(folder)


@pytest.mark.parametrize("tool", ["git", "patch"])
def test_a_series_is_applied_with_whatever_tool_is_there(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    tree = fake_llama.write_checkout(tmp_path / "tree")
    monkeypatch.setenv("PATH", path_with_only(tool, tmp_path / "bin"))
    apply_series(read_series(), tree)
    assert "MESH_NAME" in (tree / "main.cpp").read_text()
    assert (tree / "mesh.h").is_file()
    assert not list(tree.glob("*.orig"))


def test_a_tree_inside_somebodys_repository_is_patched_all_the_same(
    fake: Fake, tmp_path: Path
) -> None:
    """`git apply` passes over files outside the part of a repository it is called in."""
    subprocess.run(["git", "init", "-q", str(tmp_path / "home")], check=True)
    tree = fake_llama.write_checkout(tmp_path / "home" / "cache" / "tree")
    apply_series(read_series(), tree)
    assert (tree / "mesh.h").is_file()


@pytest.mark.parametrize("tool", ["git", "patch"])
def test_a_patch_that_does_not_fit_is_named_with_its_file(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    tree = fake_llama.write_checkout(tmp_path / "tree")
    (tree / "main.cpp").write_text("int main() {}\n")
    monkeypatch.setenv("PATH", path_with_only(tool, tmp_path / "bin"))
    with pytest.raises(PatchFailed, match=f"^{fake_llama.PATCH_NAME} does not apply to main.cpp: "):
        apply_series(read_series(), tree)


@pytest.mark.parametrize("tool", ["git", "patch"])
def test_a_patch_for_a_file_that_is_gone_is_named_too(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    tree = fake_llama.write_checkout(tmp_path / "tree")
    (tree / "main.cpp").unlink()
    monkeypatch.setenv("PATH", path_with_only(tool, tmp_path / "bin"))
    with pytest.raises(PatchFailed, match=f"^{fake_llama.PATCH_NAME} does not apply to "):
        apply_series(read_series(), tree)


def test_without_git_and_patch_the_remedy_is_named(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", path_with_only(None, tmp_path / "bin"))
    with pytest.raises(PatchFailed, match="install one with `"):
        apply_series(read_series(), tmp_path)


def test_a_listed_patch_that_is_missing_is_an_error(fake: Fake) -> None:
    (fake.patches / fake_llama.PATCH_NAME).unlink()
    with pytest.raises(PatchFailed, match="is not there"):
        read_series()


def test_missing_patches_say_to_install_again(tmp_path: Path) -> None:
    with pytest.raises(PatchFailed, match="install mesh again"):
        read_series(tmp_path)


def test_the_key_changes_with_source_order_and_bytes_and_with_nothing_else(fake: Fake) -> None:
    series = read_series()
    key = engine_key_of("a", series, stock=False)
    assert key == engine_key_of("a", read_series(), stock=False)
    assert key != engine_key_of("b", series, stock=False)
    stock = engine_key_of("a", series, stock=True)
    assert stock.startswith("stock-")
    with (fake.patches / fake_llama.PATCH_NAME).open("a") as file:
        file.write("\n")
    assert key != engine_key_of("a", read_series(), stock=False)
    assert stock == engine_key_of("a", read_series(), stock=True)


def test_edit_and_export_change_no_byte(fake: Fake) -> None:
    assert patch_tree.check_round_trip(quiet) == 1


def test_a_patch_that_git_would_write_otherwise_is_found_by_the_round_trip(fake: Fake) -> None:
    patch = fake.patches / fake_llama.PATCH_NAME
    patch.write_text(patch.read_text().replace(fake_llama.blob_id(fake_llama.MAIN), "0" * 40))
    with pytest.raises(PatchFailed, match=f"changes {fake_llama.PATCH_NAME}"):
        patch_tree.check_round_trip(quiet)


def test_a_patch_that_no_series_lists_is_found_by_the_round_trip(fake: Fake) -> None:
    (fake.patches / "0009-forgotten.patch").write_text("")
    with pytest.raises(PatchFailed, match="changes 0009-forgotten"):
        patch_tree.check_round_trip(quiet)


def test_a_commit_in_the_edited_tree_becomes_a_patch_and_one_taken_away_goes(
    fake: Fake, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    assert patch_tree.edit(tree, quiet) == 1
    (tree / "mesh.h").write_text('#define MESH_NAME "edited"\n')
    git = ["git", "-C", str(tree)]
    with pytest.raises(UsageError, match="not committed"):
        patch_tree.export(tree)
    subprocess.run([*git, "commit", "-qam", "Another name"], check=True)
    assert patch_tree.export(tree) == ("0002-Another-name.patch", "series")
    assert [patch.name for patch in read_series().patches] == [
        fake_llama.PATCH_NAME,
        "0002-Another-name.patch",
    ]
    subprocess.run([*git, "reset", "-q", "--hard", "HEAD~1"], check=True)
    assert patch_tree.export(tree) == ("removed 0002-Another-name.patch", "series")
    assert patch_tree.export(tree) == ("nothing changed",)


def test_an_edited_tree_is_never_overwritten(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is there already"):
        patch_tree.edit(tmp_path, quiet)
    with pytest.raises(UsageError, match="no edited engine tree"):
        patch_tree.export(tmp_path)
