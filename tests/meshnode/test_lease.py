"""A worker's leases over a real tunnel with a real rpc-server: what is refused, what ends one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import trio

from meshnode.config import LendConfig
from meshnode.engine.cache import Engine, load_engine
from meshnode.engine.children import open_child
from meshnode.engine.devices import cpu_device
from meshnode.engine.sandbox.check import prepare_sandbox
from meshnode.engine.speed import Speeds
from meshnode.events import Event
from meshnode.models.facts import read_facts
from meshnode.models.manifest import digest_model, to_wire
from meshnode.models.shelf import Shelf
from meshnode.models.store.disk import check_room
from meshnode.models.store.store import Store
from meshnode.models.store.writer import SliceWriter
from meshnode.pipeline.borrow import LeaseRefused, ask_facts, borrow
from meshnode.pipeline.figures import Figures
from meshnode.pipeline.gauge import Gauge
from meshnode.pipeline.inventory import Inventory
from meshnode.pipeline.lease import MAX_LEASES, LeaseDesk
from meshnode.pipeline.matching import Matched
from meshnode.pipeline.probing import Probing
from meshnode.pipeline.protocol import LeaseRequest
from meshnode.pipeline.pushing import LeaseEnds
from tests.engine.synthetic import make_model
from tests.meshnode.models.store.slices import Whole, pull
from tunnels import Endpoint, Identity, Session, StreamError

pytestmark = pytest.mark.engine

MEMORY_BYTES = 64 * 2**20
LENDS = LendConfig(memory_bytes=2 * MEMORY_BYTES, threads=1)
SOON_S = 20


@dataclass
class Scene:
    """A worker with one model, and a session of an orchestrator's to it."""

    desk: LeaseDesk
    session: Session
    request: LeaseRequest
    endpoint: Endpoint
    worker: Endpoint
    freed: trio.Event

    async def until_free(self) -> None:
        with trio.fail_after(SOON_S):
            await self.freed.wait()
        assert self.desk.leases == ()


@asynccontextmanager
async def scene(
    folder: Path, engine: Engine, lend: LendConfig = LENDS, figures: Figures | None = None
) -> AsyncIterator[Scene]:
    models, manifests, runtime = folder / "models", folder / "manifests", folder / "run"
    for each in (models, manifests, runtime):
        each.mkdir()
    model = make_model(models / "small.gguf", layers=2, width=64, ffn=64)
    shelf = Shelf((models,), manifests)
    freed = trio.Event()

    def emit(event: Event) -> None:
        if "free again" in event.text:
            freed.set()

    desk = LeaseDesk(
        name="worker",
        engine=engine,
        inventory=Inventory(engine, (cpu_device(),)),
        lend=lend,
        shelf=shelf,
        runtime_folder=runtime,
        log_folder=folder,
        emit=emit,
        sandbox=prepare_sandbox(lend.sandbox, (folder / "manifests",)),
        figures=figures,
    )
    worker = Endpoint(Identity.generate(), authorize=lambda _peer, _service: True)
    worker.serve("control", desk.serve_control)
    worker.serve("rpc/", desk.serve_rpc)
    borrower = Endpoint(Identity.generate(), authorize=lambda _peer, _service: False)
    async with trio.open_nursery() as nursery:
        await nursery.start(worker.run, "127.0.0.1", 0)
        await nursery.start(borrower.run, "127.0.0.1", 0)
        manifest = await shelf.manifest(shelf.find(str(model)))
        request = LeaseRequest(engine.key, "small", MEMORY_BYTES, to_wire(manifest))
        session = await borrower.connect(worker.peer, worker.candidates())
        yield Scene(desk, session, request, borrower, worker, freed)
        nursery.cancel_scope.cancel()


@pytest.fixture
def engine(engine_bin: Path) -> Engine:
    return load_engine(engine_bin)


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A socket's path is limited to about 100 bytes."""
    return tmp_path_factory.mktemp("l")


async def test_a_worker_says_what_it_lends(short_path: Path, engine: Engine) -> None:
    async with scene(short_path, engine) as stage:
        facts = await ask_facts(stage.session)
    assert (facts.name, facts.engine_key) == ("worker", engine.key)
    assert facts.usable_bytes == 2 * MEMORY_BYTES
    assert "small" in facts.models


async def test_a_worker_tells_its_speed_and_measures_nothing_under_a_lease(
    short_path: Path, engine: Engine
) -> None:
    inventory = Inventory(engine, (cpu_device(),))

    async def at_once() -> bool:
        return True

    gauge = Gauge(Speeds(short_path, engine), inventory, quiet=at_once)
    figures = Figures(gauge, Probing(lambda: ()), lambda _peer, _asker: True)
    async with scene(short_path, engine, figures=figures) as stage:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gauge.run)
            with trio.fail_after(60):
                async with borrow(stage.session, stage.request, lambda *_: None):
                    await gauge.settle()  # it is in use: nobody waits
                    (device,) = (await ask_facts(stage.session)).devices
                    assert device.speed is None
                await gauge.settle()
        (device,) = (await ask_facts(stage.session)).devices
    assert device.speed is not None
    assert device.speed.decode_bytes_per_s > 1e8


async def test_a_lease_lasts_as_long_as_its_stream(short_path: Path, engine: Engine) -> None:
    async with scene(short_path, engine) as stage:
        async with borrow(stage.session, stage.request, lambda *_: None) as borrowed:
            (lease,) = stage.desk.leases
            assert lease.id == borrowed.granted.lease
            assert borrowed.granted.usable_count > 0
            assert borrowed.granted.differing == ()
            assert stage.desk.usable_bytes() == MEMORY_BYTES
        await stage.until_free()
        assert stage.desk.usable_bytes() == 2 * MEMORY_BYTES
        assert not lease.socket.exists()
        assert not list(lease.socket.parent.glob("*.manifest"))


async def test_a_slice_is_not_removed_while_it_is_lent_from(
    short_path: Path, engine: Engine
) -> None:
    async with scene(short_path, engine) as stage:
        model = short_path / "models" / "small.gguf"
        whole = Whole(read_facts(model), digest_model(read_facts(model)))
        store = Store(short_path / "models")
        made = whole.create(store)
        with SliceWriter(made.folder) as writer:
            pull(writer, whole, whole.all_names)
        model.unlink()
        async with borrow(stage.session, stage.request, lambda *_: None) as borrowed:
            assert borrowed.granted.usable_count == len(whole.all_names)
            assert store.collect(0).in_use == (made.folder.name,)
        await stage.until_free()
        assert store.remove(made.folder).freed_bytes > 0


async def test_another_engine_is_told_apart_in_a_sentence(short_path: Path, engine: Engine) -> None:
    async with scene(short_path, engine) as stage:
        other = replace(stage.request, engine_key="another")
        with pytest.raises(LeaseRefused, match="mesh engine build"):
            async with borrow(stage.session, other, lambda *_: None):
                pass


async def test_more_memory_than_there_is_is_refused(short_path: Path, engine: Engine) -> None:
    async with scene(short_path, engine) as stage:
        greedy = replace(stage.request, memory_bytes=MEMORY_BYTES + 1)
        async with borrow(stage.session, stage.request, lambda *_: None):
            with pytest.raises(LeaseRefused, match=r"64\.0 MiB"):
                async with borrow(stage.session, greedy, lambda *_: None):
                    pass


async def test_leases_of_next_to_nothing_are_few_whoever_asks(
    short_path: Path, engine: Engine
) -> None:
    """Each is a process: a member who invites could ask under any number of keys."""
    async with scene(short_path, engine) as stage:
        tiny = replace(stage.request, memory_bytes=1)
        for _ in range(MAX_LEASES):
            stage.desk._reserve(LeaseEnds(Identity.generate().peer), tiny)
        with pytest.raises(LeaseRefused, match=f"lends {MAX_LEASES} times already"):
            async with borrow(stage.session, tiny, lambda _progress: None):
                pass


async def test_a_refusal_names_none_of_the_workers_folders(
    short_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(short_path, engine) as stage:

        async def no_room(*_: object) -> Matched:
            check_room(short_path / "models", 2**62, "pulling glm")
            raise AssertionError

        monkeypatch.setattr(stage.desk._matching, "match", no_room)
        with pytest.raises(LeaseRefused, match=r"pulling glm needs .* more in …, and") as no:
            async with borrow(stage.session, stage.request, lambda _: None):
                pass
        assert str(short_path) not in str(no.value)


async def test_junk_for_a_manifest_is_refused(short_path: Path, engine: Engine) -> None:
    async with scene(short_path, engine) as stage:
        junk = replace(stage.request, wanted=b"\xff junk")
        with pytest.raises(LeaseRefused, match="damaged"):
            async with borrow(stage.session, junk, lambda *_: None):
                pass


async def test_only_the_owner_reaches_the_rpc_server(short_path: Path, engine: Engine) -> None:
    async with scene(short_path, engine) as stage, trio.open_nursery() as nursery:
        stranger = Endpoint(Identity.generate(), authorize=lambda _peer, _service: False)
        await nursery.start(stranger.run, "127.0.0.1", 0)
        session = await stranger.connect(stage.worker.peer, stage.worker.candidates())
        async with borrow(stage.session, stage.request, lambda *_: None) as borrowed:
            service = f"rpc/{borrowed.granted.lease}"
            stream = await session.open(service)
            with pytest.raises(StreamError, match="no such lease"):
                await stream.receive_some()
            own = await stage.session.open(service)
            await own.send_all(b"\x0e" + (24).to_bytes(8, "little") + bytes(24))
            assert len(await own.receive_some()) > 0, "a HELLO is answered"
            await own.aclose()
        nursery.cancel_scope.cancel()


async def test_a_lost_owner_frees_the_memory(short_path: Path, engine: Engine) -> None:
    async with scene(short_path, engine) as stage:
        async with borrow(stage.session, stage.request, lambda *_: None) as borrowed:
            await stage.session.aclose("gone")
            with trio.fail_after(SOON_S):
                await borrowed.ended.wait()
        await stage.until_free()


async def test_a_dead_rpc_server_ends_the_lease_with_a_sentence(
    short_path: Path, engine: Engine
) -> None:
    async with scene(short_path, engine) as stage:
        async with borrow(stage.session, stage.request, lambda *_: None) as borrowed:
            (child,) = (
                one for one in psutil.Process().children() if "ggml-rpc-server" in one.name()
            )
            os.kill(child.pid, signal.SIGKILL)
            with trio.fail_after(SOON_S):
                await borrowed.ended.wait()
            assert "rpc-server on worker ended" in borrowed.reason
        await stage.until_free()


HOG_BYTES = 400 * 2**20
HOG = f"x = bytearray(b'1') * {HOG_BYTES}; print(1, flush=True); __import__('signal').pause()"


async def test_other_children_of_the_node_are_not_taken_for_lent_memory(
    short_path: Path, engine: Engine
) -> None:
    """A node that lends and serves runs a llama-server too: its memory is not there to lend."""
    grown = trio.Event()
    async with (
        scene(short_path, engine) as stage,
        borrow(stage.session, stage.request, lambda *_: None),
        open_child(
            [sys.executable, "-c", HOG],
            env={},
            log=short_path / "hog.log",
            name="hog",
            on_line=lambda _line: grown.set(),
        ) as hog,
    ):
        with trio.fail_after(SOON_S):
            await grown.wait()
        assert psutil.Process(hog.pid).memory_info().rss > HOG_BYTES
        assert 0 < stage.desk.held_bytes() < HOG_BYTES
