"""A worker refuses a lease: the model was replaced at its source, it says. The source is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from meshnode.engine.cache import Engine
from meshnode.errors import MeshError
from meshnode.messages import MANIFEST_MESSAGE_BYTES, MessageStream
from meshnode.models.fetching import Fetcher, OpenSource
from meshnode.models.peers.protocol import Holding
from meshnode.models.peers.source import PeerSource
from meshnode.models.pull.source import SourceChanged
from meshnode.models.spans import Span
from meshnode.models.store.store import Store
from meshnode.models.web import Web
from meshnode.pipeline.borrow import LeaseRefused
from meshnode.pipeline.deployment import Deployment, Placement
from meshnode.pipeline.part import SOURCE_LOOK_S, Part
from meshnode.pipeline.plan import Plan, PlanNode, Share
from meshnode.pipeline.protocol import DeviceFacts, WorkerFacts
from meshnode.pipeline.survey import Lender
from tests.lab import web as lab
from tests.lab.sources import FileSource
from tests.meshnode.models.store.slices import VALIDATOR, Whole, make_whole
from tunnels import Endpoint, Identity, PeerId, Session, Stream
from tunnels.offline import NearNetwork

REPLACED = "m is another file at its source than the one begun here: start again for the new one"
OTHER = "etag:2"
ENDS_WITHIN_S = 30
PLENTY_BYTES = 1 << 30
TOWER = PeerId(bytes(31) + b"t")


@dataclass(frozen=True)
class _Session:
    peer: PeerId


@dataclass
class Scene:
    """This machine needs nothing of the model; `tower` is to compute all of it."""

    folder: Path
    whole: Whole
    source: FileSource
    holders: list[PeerSource] = field(default_factory=list)

    def part(self, open_source: OpenSource | None = None, **changes: Any) -> Part:
        async def find(_identity: str) -> Sequence[PeerSource]:
            return self.holders

        store = Store(self.folder / "models")
        fetcher = Fetcher(store, open_source or self.source.open, find)
        needed = {"local": [], "tower": self.whole.all_names}
        part = Part(self.whole.create(store), needed, "local", fetcher, {"tower": TOWER})
        return replace(part, **changes)

    def tower_holds_all(self) -> None:
        spans = tuple(
            Span(one.file_index, one.offset, one.offset + one.nbytes)
            for one in self.whole.facts.tensors
        )
        files = tuple((file.name, file.size_bytes) for file in self.whole.files())
        holding = Holding(files, VALIDATOR, spans)
        self.holders = [PeerSource(cast(Any, _Session(TOWER)), "tower", "", holding)]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    whole = make_whole(tmp_path / "whole")
    return Scene(tmp_path, whole, FileSource(whole.facts.path, VALIDATOR))


# -- a deployment ---------------------------------------------------------------------------------


@asynccontextmanager
async def refusing() -> AsyncIterator[Session]:
    """A session with a worker that refuses each lease, with the words of one that saw the swap."""

    async def control(stream: Stream) -> None:
        messages = MessageStream(stream)
        await messages.receive_untrusted(MANIFEST_MESSAGE_BYTES)
        await messages.send({"event": "refused", "reason": REPLACED})
        await stream.send_eof()

    worker, node = (
        Endpoint(Identity.generate(), authorize=lambda _peer, _service: True) for _ in range(2)
    )
    worker.serve("control", control)
    async with trio.open_nursery() as nursery:
        for endpoint in (worker, node):
            await nursery.start(endpoint.run, "127.0.0.1", 0)
        yield await node.connect(worker.peer, worker.candidates())
        nursery.cancel_scope.cancel()


def deployment(scene: Scene, session: Session) -> Deployment:
    device = DeviceFacts("CPU", "a processor", False, PLENTY_BYTES, PLENTY_BYTES)
    facts = WorkerFacts("tower", "key", "cpu", PLENTY_BYTES, (device,), ())
    share = Share("tower", "CPU", 0, 3, True, 80, 10, 1)
    placement = Placement(
        local=PlanNode("local", True, ()),
        model=scene.whole.facts.path,
        model_name="m",
        plan=Plan((share,), False, 4, (1,), ("RPC0",), ("tower",)),
        lenders=(Lender("tower", session, facts),),
        manifest=None,
        ctx_tokens=512,
        slots=1,
        threads=None,
        engine_options=(),
        part=scene.part(),
    )
    return Deployment(
        placement,
        engine=Engine(scene.folder, "key", "cpu", False, "source", "c++", "cpu"),
        runtime_folder=scene.folder,
        log_folder=scene.folder,
        emit=lambda _event: None,
        on_step=lambda *_: None,
    )


@pytest.mark.parametrize(
    ("source", "ends_in"),
    [
        ({"version": OTHER}, SourceChanged),
        ({}, LeaseRefused),
        ({"version": OTHER, "is_there": False}, LeaseRefused),
    ],
    ids=["replaced", "a lie", "out of reach"],
)
async def test_a_worker_is_not_believed_that_the_file_was_replaced_but_its_source_is(
    scene: Scene, source: dict[str, Any], ends_in: type[MeshError]
) -> None:
    scene.source = replace(scene.source, **source)
    async with refusing() as session:
        with trio.fail_after(ENDS_WITHIN_S), pytest.raises(ends_in) as caught:
            await deployment(scene, session).run(lambda _deployed: None)
    assert type(caught.value) is ends_in
    assert "m is another file at its source" in str(caught.value)


# -- who is asked, and when -----------------------------------------------------------------------


async def test_a_source_that_nobody_needs_any_more_may_have_what_it_likes(scene: Scene) -> None:
    scene.source.version = OTHER
    with pytest.raises(SourceChanged):
        await scene.part().check_source()
    scene.tower_holds_all()
    await scene.part().check_source()


async def test_a_source_that_workers_cannot_see_is_none_that_they_tell_of(scene: Scene) -> None:
    scene.source.version = OTHER
    await scene.part(is_secret=True).check_source()


async def test_a_source_that_does_not_answer_holds_nobody_up(
    scene: Scene, autojump_clock: trio.testing.MockClock
) -> None:
    @asynccontextmanager
    async def mute(_reference: str) -> AsyncIterator[FileSource]:
        await trio.sleep_forever()
        yield scene.source

    before_s = trio.current_time()
    await scene.part(mute).check_source()
    assert trio.current_time() - before_s == pytest.approx(SOURCE_LOOK_S, abs=0.1)


async def test_offline_nobody_beyond_is_asked(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = lab.Web(scene.whole.facts.path.read_bytes())
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)

        def open_at_server(web: Web) -> OpenSource:
            return lambda _reference: web.open_for_user(server.url)

        with pytest.raises(SourceChanged):
            await scene.part(open_at_server(Web(offline=True))).check_source()
        server.queries.clear()
        monkeypatch.setattr(NearNetwork, "is_near", lambda *_: False)
        await scene.part(open_at_server(Web(offline=True))).check_source()
        assert (server.queries, server.connections) == ([], 1)
        nursery.cancel_scope.cancel()
