"""kill -9 at any step: what was told to be held is held, and one piece at most is pulled again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meshnode.models.slice_mark import SLICE_DOCUMENT
from meshnode.models.spans import size_of
from meshnode.models.store.disk import allocated_bytes
from meshnode.models.store.slice import open_slice
from meshnode.models.store.store import Store
from meshnode.models.store.writer import SliceWriter
from tests.meshnode.models.store import filling
from tests.meshnode.models.store.filling import PIECE_BYTES
from tests.meshnode.models.store.slices import (
    Whole,
    holds_the_right_bytes,
    make_whole,
    pull,
)

PULL_POINTS = ("written", "flushed", "journalled", "digested", "held")
CREATE = """
import sys
from pathlib import Path
from meshnode.models.store.store import NewFile, Store
path = Path(sys.argv[2])
size = path.stat().st_size
Store(Path(sys.argv[1])).create([NewFile(path.name, size, path.read_bytes())], "here", "etag:1")
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def killed(crash_at: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "MESH_CRASH_AT": crash_at, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    return done


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("point", PULL_POINTS)
def test_a_killed_pull_goes_on_where_it_was(
    store: Store, whole: Whole, point: str, number: int
) -> None:
    made = whole.create(store)
    done = killed(
        f"slice.{point}:{number}",
        *(filling.__file__, str(made.folder), str(whole.facts.path), "pull"),
    )
    told_bytes = len(done.stdout.split()) * PIECE_BYTES
    told_held = open_slice(made.folder).document.held
    with SliceWriter(made.folder) as writer:
        missing_bytes = size_of(writer.missing(whole.all_names))
        assert told_held <= writer.slice.document.held, "it was all read again, and is right"
        assert whole.facts.weight_bytes - missing_bytes >= told_bytes - PIECE_BYTES
        pull(writer, whole, whole.all_names)
    found = open_slice(made.folder)
    assert found.complete
    assert found.identity.root == whole.manifest.root
    assert holds_the_right_bytes(found, whole)


def test_a_slice_killed_while_it_was_made_is_not_there(store: Store, whole: Whole) -> None:
    killed("slice.created", "-c", CREATE, str(store.folder), str(whole.facts.path))
    (left,) = store.folder.iterdir()
    assert left.name.startswith(".new-")
    assert store.folders() == []
    assert whole.create(store).folder.name == "m"
    assert not left.exists(), "swept away"


def test_what_was_being_dropped_is_gone_and_its_room_given_back(
    store: Store, tmp_path: Path
) -> None:
    whole = make_whole(tmp_path / "large", layers=3, width=256, ffn=512)
    made = whole.create(store)
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.all_names)
    before = allocated_bytes(made.folder)
    killed("slice.dropped", filling.__file__, str(made.folder), str(whole.facts.path), "drop")
    found = open_slice(made.folder)
    assert not any(tensor.name.startswith("blk.1.") for tensor in found.held)
    assert allocated_bytes(made.folder) >= before - 8192, "killed before it was given back"
    SliceWriter(made.folder).close()
    assert allocated_bytes(made.folder) <= before - whole.facts.layer_bytes[1] + 16384
    assert holds_the_right_bytes(open_slice(made.folder), whole)


@pytest.mark.parametrize("point", ["opened", "half", "written", "flushed", "renamed"])
def test_a_kill_while_the_document_is_replaced_leaves_the_old_or_the_new(
    store: Store, whole: Whole, point: str
) -> None:
    made = whole.create(store)
    killed(
        f"state.{point}:2",
        *(filling.__file__, str(made.folder), str(whole.facts.path), "pull"),
    )
    assert open_slice(made.folder).document.sealed
    with SliceWriter(made.folder) as writer:
        pull(writer, whole, whole.all_names)
    assert open_slice(made.folder).complete
    left = {path.name for path in made.folder.iterdir()}
    assert left == {whole.facts.path.name, SLICE_DOCUMENT, "journal", "lock", "used"}
