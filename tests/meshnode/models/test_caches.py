"""Models in the caches of other programs are found under the names those have for them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from meshnode.errors import AmbiguousModel, ModelError
from meshnode.models import caches
from meshnode.models.caches import HUB, OLLAMA
from meshnode.models.catalog import Catalog
from meshnode.models.facts import read_facts
from tests.engine.synthetic import make_model

MODEL_LAYER = "application/vnd.ollama.image.model"


def small(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape: dict[str, Any] = {"layers": 1, "width": 32, "vocab": 260, "heads": 1, "ffn": 32}
    return make_model(path, **(shape | changes))


def scanned(folder: Path) -> Catalog:
    catalog = Catalog([folder])
    catalog.scan()
    return catalog


def files_of(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


# -- Ollama ---------------------------------------------------------------------------------------


class Ollama:
    """A folder such as ~/.ollama/models."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs").mkdir(parents=True)
        (folder / "manifests").mkdir()

    def blob(self, seed: int, separator: str = "-") -> str:
        data = small(self.folder.parent / f"{seed}.gguf", seed=seed).read_bytes()
        (self.folder.parent / f"{seed}.gguf").unlink()
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / "blobs" / f"sha256{separator}{digest}").write_bytes(data)
        return f"sha256:{digest}"

    def name(self, place: str, digest: str) -> Path:
        path = self.folder / "manifests" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        layers = [
            {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64},
            {"mediaType": MODEL_LAYER, "digest": digest, "size": 1},
            {"mediaType": "application/vnd.ollama.image.projector", "digest": "sha256:" + "1" * 64},
        ]
        path.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
        return path


def test_ollamas_models_have_the_names_that_ollama_lists(tmp_path: Path) -> None:
    ollama = Ollama(tmp_path / ".ollama" / "models")
    llama, other, third = (ollama.blob(seed) for seed in range(3))
    ollama.name("registry.ollama.ai/library/llama3/8b", llama)
    ollama.name("registry.ollama.ai/library/llama3/latest", llama)
    ollama.name("registry.ollama.ai/someone/tiny/q4", other)
    ollama.name("hf.co/org/Repo-GGUF/Q4_K_M", third)
    before = files_of(tmp_path)
    catalog = scanned(tmp_path)
    assert sorted(entry.name for entry in catalog.models()) == [
        "hf.co/org/Repo-GGUF:Q4_K_M",
        "llama3:8b",
        "someone/tiny:q4",
    ]
    blob = ollama.folder / "blobs" / llama.replace(":", "-")
    for name in ("llama3:8b", "LLAMA3:latest", "llama3"):
        assert catalog.resolve(name) == blob
    assert catalog.resolve("hf.co/org/repo-gguf:q4_k_m") == (
        ollama.folder / "blobs" / third.replace(":", "-")
    )
    assert {entry.source for entry in catalog.models()} == {OLLAMA}
    assert all(entry.complete for entry in catalog.models())
    assert read_facts(blob).n_layers == 1
    assert files_of(tmp_path) == before, "nothing is written there"


def test_blobs_of_an_older_ollama_are_found(tmp_path: Path) -> None:
    ollama = Ollama(tmp_path / "models")
    digest = ollama.blob(0, separator=":")
    ollama.name("registry.ollama.ai/library/old/latest", digest)
    assert scanned(tmp_path).resolve("old").name == digest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        '{"layers": 7}',
        '{"layers": [7]}',
        '{"layers": [{}]}',
        '{"layers": []}',
        json.dumps({"layers": [{"mediaType": MODEL_LAYER, "digest": "sha256:../../etc/passwd"}]}),
        json.dumps({"layers": [{"mediaType": MODEL_LAYER, "digest": 7}]}),
        json.dumps({"layers": [{"mediaType": MODEL_LAYER, "digest": "sha256:" + "a" * 64}]}),
        json.dumps({"layers": [{"mediaType": MODEL_LAYER, "digest": "x"}] * 2}),
        "[" * 100_000,
        " " * (1 << 20) + " ",
    ],
)
def test_a_damaged_manifest_names_nothing(tmp_path: Path, text: str) -> None:
    ollama = Ollama(tmp_path / "models")
    good = ollama.name("registry.ollama.ai/library/good/latest", ollama.blob(0))
    (good.parent / "bad").write_text(text)
    assert [entry.name for entry in scanned(tmp_path).models()] == ["good:latest"]


def test_a_manifest_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    ollama = Ollama(tmp_path / "models")
    path = ollama.name("registry.ollama.ai/library/good/latest", ollama.blob(0))
    os.mkfifo(path.parent / "pipe")
    assert len(scanned(tmp_path).models()) == 1


def test_very_many_manifests_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MAX_MANIFESTS", 2)
    ollama = Ollama(tmp_path / "models")
    for seed in range(3):
        ollama.name(f"registry.ollama.ai/library/m{seed}/latest", ollama.blob(seed))
    assert len(scanned(tmp_path).models()) == 2


# -- Hugging Face ---------------------------------------------------------------------------------


class Hub:
    """A folder such as ~/.cache/huggingface/hub."""

    def __init__(self, folder: Path, repo: str = "models--org--Repo-GGUF") -> None:
        self.repo = folder / repo
        (self.repo / "blobs").mkdir(parents=True)

    def snapshot(self, revision: str, name: str, *, seed: int = 0, shards: int = 1) -> Path:
        folder = self.repo / "snapshots" / revision
        made = small(self.repo / "made" / name, seed=seed, shards=shards)
        for path in made.parent.iterdir():
            blob = self.repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            path.replace(blob)
            place = folder / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(blob, place.parent))
        made.parent.rmdir()
        return folder / made.name

    def main_is(self, revision: str) -> None:
        (self.repo / "refs").mkdir()
        (self.repo / "refs" / "main").write_text(revision)


def test_a_hubs_models_are_found_by_file_and_repository(tmp_path: Path) -> None:
    path = Hub(tmp_path / "hub").snapshot("a" * 40, "glm-Q4_K_M.gguf")
    sharded = Hub(tmp_path / "hub", "models--org--Big").snapshot("b" * 40, "big.gguf", shards=3)
    catalog = scanned(tmp_path / "hub")
    for name in ("glm-q4_k_m", "org/Repo-GGUF/glm-Q4_K_M", "org/repo-gguf"):
        assert catalog.resolve(name) == path
    entry = catalog.named("org/big")
    assert (entry.path, len(entry.files), entry.complete) == (sharded, 3, True)
    assert (entry.source, entry.place) == (HUB, "org/Big")


def test_of_two_revisions_the_one_that_main_is_wins(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub")
    old = hub.snapshot("f" * 40, "m.gguf", seed=0)
    new = hub.snapshot("0" * 40, "m.gguf", seed=1)
    gone = hub.snapshot("1" * 40, "only-here.gguf", seed=2)
    os.utime(old.parent, (2**31, 2**31))
    assert scanned(tmp_path).resolve("m") == old, "the newest, where main is not known"
    hub.main_is("0" * 40)
    catalog = scanned(tmp_path)
    assert catalog.resolve("m") == new
    assert catalog.resolve("only-here") == gone
    with pytest.raises(AmbiguousModel, match="several"):
        catalog.resolve("org/Repo-GGUF")


def test_a_link_to_a_blob_that_is_gone_is_no_model(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub")
    hub.snapshot("a" * 40, "m.gguf")
    shutil.rmtree(hub.repo / "blobs")
    assert scanned(tmp_path).models() == ()


# -- LM Studio ------------------------------------------------------------------------------------


def test_lm_studios_models_are_found_by_publisher_and_repository(tmp_path: Path) -> None:
    path = small(tmp_path / "models" / "lmstudio-community" / "GLM-4-GGUF" / "glm-Q4.gguf")
    small(tmp_path / "models" / "lmstudio-community" / "GLM-4-GGUF" / "mmproj-glm.gguf")
    other = small(tmp_path / "models" / "bartowski" / "GLM-4-GGUF" / "glm-Q4.gguf")
    catalog = scanned(tmp_path / "models")
    for name in ("lmstudio-community/glm-4-gguf", "lmstudio-community/GLM-4-GGUF/glm-q4"):
        assert catalog.resolve(name) == path
    assert catalog.resolve("bartowski/GLM-4-GGUF/glm-Q4") == other
    with pytest.raises(AmbiguousModel, match="several models are named 'glm-q4'"):
        catalog.resolve("glm-q4")
    with pytest.raises(ModelError, match="there is no file"):
        catalog.resolve("bartowski/none")
