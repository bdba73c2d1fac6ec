from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from meshnode.engine import source
from meshnode.engine.errors import NoRoomToBuild, SourceUnavailable
from meshnode.engine.patches import Upstream, read_series
from tests.meshnode.engine import fake_llama
from tests.meshnode.engine.conftest import Fake


def quiet(done: int, total: int, line: str) -> None:
    pass


def upstream_of(sdist: Path, sha256: str) -> Upstream:
    return Upstream("mesh-fake-llama", "1.0", sha256, "vendor/llama.cpp")


def test_the_tree_is_unpacked_once_without_what_no_build_reads(fake: Fake) -> None:
    upstream = read_series().upstream
    first = source.open_source(fake.sdist, upstream, quiet)
    names = {path.as_posix() for path in source.tree_files(first.tree)}
    assert names == set(fake_llama.files()) - {"models/vocabulary.gguf"}
    assert first.digest == upstream.sha256 == source.source_digest(fake.sdist, upstream)
    (first.tree / "main.cpp").unlink()
    again = source.open_source(fake.sdist, upstream, quiet)
    assert not (again.tree / "main.cpp").exists(), "unpacked a second time"


def test_an_sdist_with_another_hash_is_refused_and_leaves_nothing(fake: Fake) -> None:
    with fake.sdist.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(SourceUnavailable, match="is pinned: it is damaged"):
        source.open_source(fake.sdist, read_series().upstream, quiet)
    assert list((fake.cache / "engine" / "sources").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [("../../../evil", tarfile.REGTYPE), ("link", tarfile.SYMTYPE), ("null", tarfile.CHRTYPE)],
)
def test_an_archive_cannot_write_or_point_outside_the_tree(
    tmp_path: Path, name: str, kind: bytes
) -> None:
    member = tarfile.TarInfo()
    member.type = kind
    member.linkname = "/etc/passwd"
    sdist = tmp_path / "evil.tar.gz"
    fake_llama.write_sdist(sdist, {name: member})
    with pytest.raises(SourceUnavailable, match="not as pinned"):
        source.extract_tree(sdist, "vendor/llama.cpp", tmp_path / "tree" / "deep")
    assert not (tmp_path / "evil").exists()


def test_an_archive_cut_off_in_the_middle_is_said_to_be_unreadable(tmp_path: Path) -> None:
    sdist = tmp_path / "cut.tar.gz"
    fake_llama.write_sdist(sdist)
    sdist.write_bytes(sdist.read_bytes()[:200])
    with pytest.raises(SourceUnavailable, match="not a readable archive"):
        source.extract_tree(sdist, "vendor/llama.cpp", tmp_path / "tree")


def test_a_folder_that_is_no_checkout_is_named(tmp_path: Path) -> None:
    upstream = upstream_of(tmp_path, "0" * 64)
    with pytest.raises(SourceUnavailable, match=r"not a llama.cpp checkout \(CMakeLists.txt"):
        source.open_source(tmp_path, upstream, quiet)


def test_a_checkout_is_known_by_its_content(tmp_path: Path) -> None:
    checkout = fake_llama.write_checkout(tmp_path / "checkout")
    before = source.tree_digest(checkout)
    (checkout / "build").mkdir()
    (checkout / "build" / "main.o").write_text("an old build is no source")
    (checkout / "models" / "vocabulary.gguf").write_text("nor is this")
    assert source.tree_digest(checkout) == before
    (checkout / "main.cpp").write_text(fake_llama.MAIN + " ")
    assert source.tree_digest(checkout) != before


def test_a_package_that_no_index_has_is_one_sentence_with_the_way_out(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip runs for real, against an empty folder for an index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(SourceUnavailable) as caught:
        source.open_source(None, read_series().upstream, quiet)
    assert "mesh-fake-llama 1.0: connect this machine" in str(caught.value)
    assert "--source" in str(caught.value)


def test_pip_itself_refuses_what_the_pin_does_not_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is a folder with an sdist of the right name and another content."""
    fake_llama.write_sdist(tmp_path / "mesh_fake_llama-1.0.tar.gz")
    monkeypatch.setenv("MESH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    upstream = Upstream("mesh-fake-llama", "1.0", "0" * 64, "vendor/llama.cpp")
    with pytest.raises(SourceUnavailable, match="sha256 is not the pinned one"):
        source.open_source(None, upstream, quiet)


@pytest.mark.parametrize(
    ("output", "kind", "sentence"),
    [
        ("OSError: [Errno 28] No space left on device", NoRoomToBuild, "the disk is full"),
        ("/usr/bin/python3: No module named pip", SourceUnavailable, "-m ensurepip"),
        ("ERROR: hook broke\nnote: see above", SourceUnavailable, r"\(ERROR: hook broke\)"),
        ("", SourceUnavailable, "it said nothing"),
    ],
)
def test_what_pip_says_becomes_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: str, kind: type, sentence: str
) -> None:
    def failing_pip(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, stdout=output.encode())

    monkeypatch.setenv("MESH_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", failing_pip)
    with pytest.raises(kind, match=sentence):
        source.open_source(None, upstream_of(tmp_path, "0" * 64), quiet)
