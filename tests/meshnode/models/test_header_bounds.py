"""A model of a thousand files takes no more memory by its headers than one of one file may."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from meshnode.models import header_bounds
from meshnode.models.cursor import U32, U64, DamagedGguf
from meshnode.models.facts import read_facts, shard_paths
from meshnode.models.fetching import Fetcher
from meshnode.models.pull import remote_header
from meshnode.models.store.store import Store
from tests.engine.synthetic import make_model
from tests.lab.sources import FileSource
from tests.meshnode.models.headers_by_hand import (
    PAIRS,
    gguf_bytes,
    number_pair,
    tensor,
    text,
    written,
)

REFERENCE = "https://example.org/s-00001-of-00006.gguf"
MIB = 2**20


def ballast(count: int) -> bytes:
    """An array of so many bytes, which nobody reads."""
    return text("ballast") + U32.pack(9) + U32.pack(0) + U64.pack(count) + bytes(count)


def shards(folder: Path, pairs: Sequence[bytes], tensors: int = 1, count: int = 6) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        split = (number_pair("split.count", count), number_pair("split.no", number))
        named = tuple(tensor(f"t.{number}.{at}", [0]) for at in range(tensors))
        content = gguf_bytes((*PAIRS, *split, *pairs), named)
        written(folder, content, f"s-{number + 1:05d}-of-{count:05d}.gguf")
    return folder / f"s-00001-of-{count:05d}.gguf"


async def test_large_headers_of_many_files_are_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_header, "USUAL_HEADER_BYTES", 0)
    monkeypatch.setattr(remote_header, "MAX_FETCHED_HEADER_BYTES", 10 * MIB)
    source = FileSource(shards(tmp_path / "served", [ballast(3 * MIB)]))
    store = Store(tmp_path / "models")
    with pytest.raises(DamagedGguf, match=r"s-00004-of-00006\.gguf: with it the headers"):
        await Fetcher(store, source.open).obtain(REFERENCE)
    assert source.asked_bytes < 11 * MIB
    assert store.folders() == []


class Crowded(FileSource):
    """Counts who reads beyond the first MiB of a header at the same time."""

    now, most = 0, 0

    async def read(
        self, file_index: int, start: int, stop: int, into: Callable[[memoryview], None]
    ) -> None:
        if stop > 2 * MIB:
            Crowded.now += 1
            Crowded.most = max(Crowded.most, Crowded.now)
            await trio.testing.wait_all_tasks_blocked(0.01)
        await super().read(file_index, start, stop, into)
        if stop > 2 * MIB:
            Crowded.now -= 1


async def test_of_large_headers_two_are_in_memory_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many orders there are, each for another model."""
    monkeypatch.setattr(remote_header, "USUAL_HEADER_BYTES", 2 * MIB)
    path = shards(tmp_path / "served", [ballast(3 * MIB)], count=1)
    fetcher = Fetcher(Store(tmp_path / "models"), Crowded(path).open)
    begun = []

    async def begin(number: int) -> None:
        begun.append(await fetcher.obtain(f"https://example.org/{number}"))

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(begin, number)
    assert len(begun) == 6
    assert Crowded.most == 2


async def test_room_between_header_and_weights_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few bytes of header, a MiB of nothing before the weights, in each file."""
    monkeypatch.setattr(remote_header, "FIRST_STEP_BYTES", 1000)
    monkeypatch.setattr(remote_header, "USUAL_HEADER_BYTES", 0)
    monkeypatch.setattr(remote_header, "MAX_FETCHED_HEADER_BYTES", 2 * MIB + 1)
    first = shards(tmp_path / "served", [number_pair("general.alignment", MIB)])
    for path in shard_paths(first):
        path.write_bytes(path.read_bytes() + bytes(2 * MIB))
    source = FileSource(first)
    with pytest.raises(DamagedGguf, match="s-00003-of-00006"):
        await Fetcher(Store(tmp_path / "models"), source.open).obtain(REFERENCE)
    assert source.asked_bytes < 2 * MIB + 6000


def test_tensors_of_all_files_count_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shards(tmp_path / "s", [], tensors=20)
    monkeypatch.setattr(header_bounds, "MAX_TENSORS", 110)
    with pytest.raises(DamagedGguf, match=r"s-00006-of-00006.*more tensors"):
        read_facts(first)
    monkeypatch.setattr(header_bounds, "MAX_TENSORS", 120)
    assert len(read_facts(first).tensors) == 120


def test_of_further_files_only_what_is_read_is_kept(tmp_path: Path) -> None:
    paths = shard_paths(make_model(tmp_path / "m.gguf", shards=3))
    first, *others = header_bounds.read_headers(paths)
    assert "general.architecture" in first.metadata
    for header in others:
        assert set(header.metadata) <= set(header_bounds._OF_FURTHER_FILES)
        assert {"split.no", "split.count"} <= set(header.metadata)


MEMORY = """
import sys, trio
from pathlib import Path
from meshnode.errors import ModelError
from meshnode.models.fetching import Fetcher
from meshnode.models.store.store import Store
from tests.lab.sources import FileSource

async def main():
    source = FileSource(Path(sys.argv[1]))
    try:
        await Fetcher(Store(Path(sys.argv[2])), source.open).obtain("https://example.org/m")
    except ModelError as error:
        print(error)
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")))

trio.run(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_hostile_model_is_bounded(tmp_path: Path) -> None:
    """Six files with headers of 56 MiB: two are more than one node may have to hold."""
    first = shards(tmp_path / "served", [*(ballast_named(at) for at in range(7))])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, first, tmp_path / "models"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    told, megabytes = done.stdout.splitlines()
    assert "s-00002-of-00006" in told
    assert int(megabytes) < 500


def ballast_named(at: int) -> bytes:
    count = 8 * MIB
    return text(f"ballast.{at}") + U32.pack(9) + U32.pack(0) + U64.pack(count) + bytes(count)
