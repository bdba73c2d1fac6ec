"""A folder of safetensors becomes a model, or a sentence says why not; nothing is half made.

The converter here is a script that copies; what llama.cpp's own does is its own affair.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from meshnode.cli.commands import run
from meshnode.errors import ModelError, UsageError
from meshnode.models.catalog import Catalog
from meshnode.models.convert import (
    REQUIREMENTS,
    SCRIPT,
    Conversion,
    ConvertFailed,
    check,
    convert,
    make_environment,
)
from meshnode.models.store import disk
from meshnode.models.store.disk import NoRoom
from meshnode.models.store.store import Store
from tests.engine.synthetic import make_model

COPYING = """
import os, sys, pathlib
place = dict(zip(sys.argv, sys.argv[1:]))
assert not any("TOKEN" in name or name.startswith("MESH_") for name in os.environ), "secrets"
assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
assert not os.listdir(os.environ["HF_HOME"]), "no code of others from a cache"
data = pathlib.Path(sys.argv[1], "model.safetensors").read_bytes()
print("type", place["--outtype"])
pathlib.Path(place["--outfile"]).write_bytes(data)
sys.exit(data == b"bad")
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A llama.cpp that copies."""
    tree = tmp_path / "llama.cpp"
    for name in ("CMakeLists.txt", "ggml/CMakeLists.txt", "tools/server/CMakeLists.txt"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    (tree / SCRIPT).write_text(COPYING)
    (tree / REQUIREMENTS).parent.mkdir()
    (tree / REQUIREMENTS).touch()
    monkeypatch.setenv("MESH_ENGINE_SOURCE", str(tree))
    monkeypatch.setenv("MESH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MESH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tree


@pytest.fixture
def wanted(tmp_path: Path) -> Conversion:
    folder = tmp_path / "Tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    model = make_model(folder / "m.gguf", layers=1, width=32, vocab=260, heads=1, ffn=32)
    model.rename(folder / "model.safetensors")
    return Conversion(folder, "Tiny")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "home" / "models"
    folder.mkdir(parents=True)
    return folder


def converted(wanted: Conversion, tree: Path, models: Path) -> Path:
    return convert(wanted, tree, Path(sys.executable), models, lambda _: None)


def test_the_result_is_a_model_like_any_other(wanted: Conversion, tree: Path, models: Path) -> None:
    made = converted(replace(wanted, kind="f16"), tree, models)
    assert made == models / "Tiny" / "Tiny.gguf"
    (entry,) = Catalog([models]).scan()
    assert (entry.name, entry.complete, entry.held_bytes) == ("Tiny", True, None)
    assert [path.name for path in made.parent.iterdir()] == ["Tiny.gguf"]
    assert (models.parent / "logs" / "convert.log").read_text() == "type f16\n"
    with pytest.raises(ModelError, match="is there already"):
        converted(wanted, tree, models)


def test_a_node_that_sweeps_takes_nothing_that_is_being_made(
    wanted: Conversion, tree: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def swept_just_before(path: Path, target: Path) -> Path:
        Store(models).sweep()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", swept_just_before)
    made = converted(wanted, tree, models)
    assert sorted(path.name for path in models.iterdir()) == ["Tiny"]
    assert [path.name for path in (models / "Tiny").iterdir()] == [made.name]


@pytest.mark.parametrize(
    "name", ["HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY"]
)
def test_the_converter_finds_no_secrets_in_its_environment(
    wanted: Conversion, tree: Path, models: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "of the user")
    (tree / SCRIPT).write_text(f"import os\nassert {name!r} not in os.environ\n" + COPYING)
    assert converted(wanted, tree, models).exists()


@pytest.mark.parametrize("data", [b"bad", b"no GGUF"], ids=["fails", "makes something else"])
def test_where_it_fails_nothing_is_left(
    wanted: Conversion, tree: Path, models: Path, data: bytes
) -> None:
    (wanted.folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError):
        converted(wanted, tree, models)
    assert list(models.iterdir()) == []


def test_a_failure_says_its_last_lines_and_where_the_rest_is(
    wanted: Conversion, tree: Path, models: Path
) -> None:
    (tree / SCRIPT).write_text("raise SystemExit('Model architecture is not supported')")
    with pytest.raises(ConvertFailed, match=r"was not converted.*\n.*not supported\n.*convert.log"):
        converted(wanted, tree, models)


def test_what_cannot_be_converted_is_told_beforehand(wanted: Conversion, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no folder"):
        check(replace(wanted, folder=tmp_path / "gone"))
    with pytest.raises(UsageError, match="--name"):
        check(replace(wanted, name="../up"))
    (wanted.folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"lacks config\.json"):
        check(wanted)
    (wanted.folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="lacks safetensors"):
        check(wanted)


def test_code_in_the_folder_is_not_run_unasked(wanted: Conversion) -> None:
    (wanted.folder / "sub").mkdir()
    (wanted.folder / "sub" / "modeling.py").touch()
    with pytest.raises(ModelError, match=r"holds Python code \(modeling\.py\).*--trust-code"):
        check(wanted)
    check(replace(wanted, runs_code=True))


def test_a_disk_with_too_little_room_is_told_beforehand(
    wanted: Conversion, tree: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(replace(wanted, kind="f32")) == 2 * check(wanted)
    monkeypatch.setattr(disk, "_space", lambda _: (1000, 1 << 40))
    with pytest.raises(NoRoom, match="converting Tiny needs"):
        converted(wanted, tree, models)


def test_an_environment_is_made_once_and_not_offline(tree: Path, tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(ModelError, match="--no-offline"):
        make_environment(tree, told.append, offline=True)
    assert told == []
    python = make_environment(tree, told.append, offline=False)
    assert python.is_file()
    assert len(told) == 2
    assert make_environment(tree, told.append, offline=True) == python
    assert len(told) == 2
    (tree / REQUIREMENTS).write_text("no-such-package-of-mesh-llm-node==0\n")
    with pytest.raises(ConvertFailed, match=r"pip could not install[^$]*--python"):
        make_environment(tree, told.append, offline=False)


def test_the_command_says_where_the_model_is(
    wanted: Conversion, tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = run(["models", "convert", str(wanted.folder), "--python", sys.executable])
    out, complaint = capfd.readouterr()
    assert (code, complaint) == (0, f"converting {wanted.folder}\n")
    assert str(tmp_path / "home" / "models" / "Tiny" / "Tiny.gguf") in out
    assert run(["models"]) == 0
    assert "Tiny" in capfd.readouterr().out
