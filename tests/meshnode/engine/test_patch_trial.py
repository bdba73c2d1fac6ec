"""The series of the miniature llama.cpp, tried on other versions of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from meshnode.cli.engine import engine_group
from meshnode.engine import patch_trial
from meshnode.engine.errors import BuildFailed, SourceUnavailable
from meshnode.engine.patch_trial import Fit, Tried, try_series
from meshnode.engine.patches import Upstream, read_series
from meshnode.errors import MeshError, UsageError
from tests.meshnode.engine import fake_llama
from tests.meshnode.engine.conftest import Fake

SECOND = "0002-Say-it-twice.patch"


def quiet(done: int, total: int, line: str) -> None:
    pass


def another_version(change: dict[str, str]) -> patch_trial.Fetch:
    """The miniature with texts of main.cpp replaced."""

    def fetch(wanted: Upstream, target: Path) -> None:
        assert (wanted.version, wanted.sha256) == ("2.0", "")
        fake_llama.write_checkout(target)
        text = (target / "main.cpp").read_text()
        for old, new in change.items():
            assert old in text
            text = text.replace(old, new)
        (target / "main.cpp").write_text(text)

    return fetch


def add_second_patch(fake: Fake, tmp_path: Path) -> None:
    """A patch that touches what the first one made, so that it can only be tried after it."""
    from meshnode.engine import patch_tree

    tree = tmp_path / "edited"
    patch_tree.edit(tree, quiet)
    with (tree / "mesh.h").open("a") as header:
        header.write("#define MESH_TWICE 1\n")
    patch_tree.commit_all(tree, "Say it twice")
    patch_tree.export(tree, fake.patches)


def test_a_version_that_differs_elsewhere_takes_every_patch_as_it_is(
    fake: Fake, tmp_path: Path
) -> None:
    fetch = another_version({"}\n": "}\n\n// a later line\n"})
    tried = try_series("2.0", tmp_path / "tree", quiet, fetch=fetch)
    assert tried == (Tried(fake_llama.PATCH_NAME, Fit.EXACT),)
    assert (tmp_path / "tree" / "mesh.h").is_file(), "the tree is kept, patches applied"


def test_what_a_version_has_already_is_merged_and_the_file_is_named(
    fake: Fake, tmp_path: Path
) -> None:
    fetch = another_version({"<cstdio>\n": '<cstdio>\n#include "mesh.h"\n'})
    tried = try_series("2.0", tmp_path / "tree", quiet, fetch=fetch)
    assert tried == (Tried(fake_llama.PATCH_NAME, Fit.MERGED, (("main.cpp", 1),)),)
    assert (tmp_path / "tree" / "main.cpp").read_text().count("mesh.h") == 1


def test_a_collision_is_counted_and_does_not_hide_what_the_next_patch_does(
    fake: Fake, tmp_path: Path
) -> None:
    add_second_patch(fake, tmp_path)
    fetch = another_version({'std::puts("stock")': 'std::puts("other")'})
    first, second = try_series("2.0", tmp_path / "tree", quiet, fetch=fetch)
    assert first == Tried(fake_llama.PATCH_NAME, Fit.FAILED, (("main.cpp", 1),))
    assert second == Tried(SECOND, Fit.EXACT)


def test_a_file_that_is_gone_is_named_whole(fake: Fake, tmp_path: Path) -> None:
    def fetch(wanted: Upstream, target: Path) -> None:
        fake_llama.write_checkout(target)
        (target / "main.cpp").unlink()

    (tried,) = try_series("2.0", tmp_path / "tree", quiet, fetch=fetch)
    assert tried.fit is Fit.FAILED
    assert [file for file, _ in tried.places] == ["main.cpp"]


@pytest.mark.parametrize("version", ["latest", "", "-r", "1.0\nevil", "1.0 --hash=x", ">=1"])
def test_what_is_no_version_is_one_sentence_and_nothing_is_fetched(
    fake: Fake, tmp_path: Path, version: str
) -> None:
    def fetch(wanted: Upstream, target: Path) -> None:
        raise AssertionError

    with pytest.raises(UsageError, match=r"^'.*' is no version number: name one such as"):
        try_series(version, tmp_path / "tree", quiet, fetch=fetch)
    assert not (tmp_path / "tree").exists()


def test_a_version_that_the_index_lacks_is_told_with_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = b"ERROR: Could not find a version that satisfies the requirement x==9 (from versions: "
    said += b"0.1, 0.2, 0.3, 0.4)\nERROR: No matching distribution found for x==9\n"

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert "--require-hashes" not in command
        return subprocess.CompletedProcess(command, 1, stdout=said)

    monkeypatch.setattr("meshnode.engine.source.subprocess.run", pip)
    with pytest.raises(
        SourceUnavailable, match=r"^the index has no sdist of x 9: .*are 0.2, 0.3, 0.4\)$"
    ):
        patch_trial.fetch_tree(Upstream("x", "9", "", "."), tmp_path / "tree")


def try_patches(monkeypatch: pytest.MonkeyPatch, fetch: patch_trial.Fetch, *more: str) -> Result:
    original = try_series

    def try_fetched(version: str, tree: Path, progress: object, **options: object) -> object:
        return original(version, tree, quiet, fetch=fetch)

    monkeypatch.setattr(patch_trial, "try_series", try_fetched)
    return CliRunner().invoke(engine_group, ["try-patches", "2.0", *more])


@pytest.mark.usefixtures("compiler")
def test_with_build_it_is_said_that_it_compiles_and_no_engine_is_left(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = another_version({"}\n": "}\n\n// a later line\n"})
    result = try_patches(monkeypatch, fetch, "--build")
    assert result.stdout.splitlines() == [
        f"{fake_llama.PATCH_NAME}: applies",
        "with 1 patches 2.0 compiles",
    ]
    assert not list((fake.cache / "engine").glob("engines/*"))
    assert not list((fake.cache / "engine").glob(".tried-*"))


@pytest.mark.usefixtures("compiler")
def test_what_applies_and_does_not_compile_ends_with_the_compilers_words(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = another_version({"}\n": "}\nnot C++\n"})
    result = try_patches(monkeypatch, fetch, "--build")
    assert isinstance(result.exception, BuildFailed)
    assert "main.cpp" in str(result.exception)


def test_patches_that_do_not_apply_end_with_how_many_and_a_next_step(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = another_version({'std::puts("stock")': 'std::puts("other")'})
    result = try_patches(monkeypatch, fetch)
    assert result.stdout == f"{fake_llama.PATCH_NAME}: does not apply, main.cpp (1)\n"
    assert isinstance(result.exception, MeshError)
    assert str(result.exception).startswith("1 of 1 patches do not apply to 2.0: carry them over")


def test_the_pinned_series_is_left_as_it_was(fake: Fake, tmp_path: Path) -> None:
    before = read_series().digest()
    try_series("2.0", tmp_path / "tree", quiet, fetch=another_version({}))
    assert read_series().digest() == before
