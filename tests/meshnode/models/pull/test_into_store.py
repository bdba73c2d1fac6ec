"""Parts of a real model from a real web server into a real slice: nginx where it is installed, and
a server that damages what it sends."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from meshnode.models.facts import read_facts
from meshnode.models.manifest import digest_model
from meshnode.models.pull.opening import open_reference
from meshnode.models.pull.pull import Pull, Supply
from meshnode.models.pull.reach import Reach, welcome
from meshnode.models.pull.reference import parse_reference
from meshnode.models.pull.remote_header import fetch_header
from meshnode.models.pull.source import RangeSource, SourceChanged
from meshnode.models.shelf import DEMO_MODEL
from meshnode.models.spans import size_of
from meshnode.models.store.store import NewFile, Store
from meshnode.models.store.writer import SliceWriter
from tests.conftest import require
from tests.lab.nginx import nginx_program, running_nginx
from tests.lab.web import Query, Web

OPEN = Reach(welcome, welcome)
CHUNK = 256 << 10


@pytest.fixture
def served(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(DEMO_MODEL.read_bytes())
    return folder


@pytest.fixture
def nginx(served: Path) -> Iterator[str]:
    program = nginx_program()
    require("nginx", program is not None, "needs nginx (./just setup)")
    assert program is not None
    with (
        tempfile.TemporaryDirectory(prefix="mesh-nginx-") as scratch,
        running_nginx(program, served, Path(scratch)) as url,
    ):
        yield f"{url}model.gguf"


def later_layers() -> list[str]:
    tensors = read_facts(DEMO_MODEL).tensors
    names = [one.name for one in tensors if one.name.startswith(("blk.2.", "blk.3."))]
    assert 0 < len(names) < len(tensors)
    return names


async def new_slice(store: Store, source: RangeSource) -> Path:
    found = await fetch_header(source, 0)
    file = source.files[0]
    new = NewFile(file.name, file.size_bytes, found.data)
    return store.create([new], "the test", source.validator).folder


def wanted_spans(writer: SliceWriter) -> tuple[int, int]:
    spans = writer.missing(later_layers())
    return len(spans), size_of(spans)


async def test_some_layers_come_from_nginx_and_a_second_pull_moves_nothing(
    nginx: str, tmp_path: Path
) -> None:
    store = Store(tmp_path / "models")
    async with open_reference(parse_reference(nginx), OPEN) as source:
        assert source.validator.startswith("etag:")
        folder = await new_slice(store, source)
        with SliceWriter(folder) as writer:
            await pull(writer, source)
            assert not writer.missing(later_layers())
            held = writer.save().held
    assert {tensor.name for tensor in held} == set(later_layers())
    data, truth = (folder / "model.gguf").read_bytes(), DEMO_MODEL.read_bytes()
    for tensor in held:
        place = slice(tensor.offset, tensor.offset + tensor.nbytes)
        assert data[place] == truth[place]
    with SliceWriter(folder) as writer:
        assert wanted_spans(writer) == (0, 0)


async def pull(writer: SliceWriter, source: RangeSource, connections: int = 3) -> None:
    wanted = writer.missing(later_layers())
    with trio.fail_after(60):
        await Pull(wanted, [Supply(source, connections)], writer, chunk_bytes=CHUNK).run()


async def test_a_pull_that_was_cut_goes_on_where_it_was(nginx: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    async with open_reference(parse_reference(nginx), OPEN) as source:
        folder = await new_slice(store, source)
        with SliceWriter(folder) as writer:
            _, before_bytes = wanted_spans(writer)
            with trio.CancelScope() as scope:

                class Cutting:
                    write = writer.write
                    missing = writer.missing

                    def done(self, file_index: int, start: int, stop: int) -> tuple[object, ...]:
                        trio.from_thread.run_sync(scope.cancel)
                        return writer.done(file_index, start, stop)

                wanted = writer.missing(later_layers())
                await Pull(wanted, [Supply(source, 1)], Cutting(), chunk_bytes=CHUNK).run()  # type: ignore[arg-type]
            assert scope.cancelled_caught
        with SliceWriter(folder) as writer:
            _, left_bytes = wanted_spans(writer)
            assert before_bytes - left_bytes >= CHUNK // 2
            await pull(writer, source)
            assert wanted_spans(writer) == (0, 0)


async def test_a_file_replaced_on_the_server_midway_is_not_mixed_in(
    nginx: str, served: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "models")
    async with open_reference(parse_reference(nginx), OPEN) as source:
        folder = await new_slice(store, source)
        other = served / "other"
        other.write_bytes(bytes(DEMO_MODEL.stat().st_size))
        os.utime(other, (1, 1))  # all nginx looks at is the length, and the second it was written
        os.replace(other, served / "model.gguf")
        with SliceWriter(folder) as writer:
            with pytest.raises(SourceChanged):
                await pull(writer, source)
            assert not writer.save().held


async def test_a_byte_damaged_on_the_way_is_fetched_anew_where_digests_are_known(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    web = Web(DEMO_MODEL.read_bytes())
    honest = web.content
    damaged = 0

    async def damaging(query: Query, stream: trio.abc.Stream) -> bool:
        nonlocal damaged
        if query.stop - query.start == CHUNK and not damaged:
            damaged = query.start + 100
            web.content = honest[:damaged] + bytes([honest[damaged] ^ 1]) + honest[damaged + 1 :]
        try:
            return await web.honest(query, stream)
        finally:
            web.content = honest

    web.behave = damaging
    await nursery.start(web.run)
    manifest = digest_model(read_facts(DEMO_MODEL))
    expected = {tensor.name: tensor.digest for tensor in manifest.tensors}
    async with open_reference(parse_reference(web.url), OPEN) as source:
        folder = await new_slice(Store(tmp_path / "models"), source)
        with SliceWriter(folder, expected) as writer:
            await pull(writer, source, connections=1)
            held = writer.save().held
    assert damaged
    assert {tensor.name for tensor in held} == set(later_layers())
    for tensor in held:
        place = slice(tensor.offset, tensor.offset + tensor.nbytes)
        assert (folder / "model.gguf").read_bytes()[place] == honest[place]
