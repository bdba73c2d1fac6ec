"""A worker finds on its disk what a lease may read, and has pulled what it was ordered to have."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

from meshnode.errors import BadMessage, NetworkError, ResourceError
from meshnode.messages import MessageStream
from meshnode.models.facts import read_facts
from meshnode.models.manifest import Manifest, WantedTensor, digest_model
from meshnode.models.manifest import to_wire as manifest_to_wire
from meshnode.models.shelf import Shelf
from meshnode.nurseries import bare_nursery
from meshnode.pipeline.matching import Fetch, Matched, Matching
from meshnode.pipeline.protocol import Progress, parse_progress_untrusted
from meshnode.pipeline.pull_order import PullOrder, pack_digests, to_wire
from tests.engine.synthetic import make_model
from tunnels import PeerId

OWNER = PeerId(bytes(range(32)))


@dataclass
class Worker:
    """With an empty folder for models; `told`: what its owner heard. What it is to have is
    `manifest`'s, and lies in `source`."""

    folder: Path
    source: Path
    manifest: Manifest
    asked: list[list[str]] = field(default_factory=list)
    told: list[Progress] = field(default_factory=list)

    @property
    def models(self) -> Path:
        return self.folder / "models"

    async def fetch(
        self,
        _asker: PeerId,
        _order: PullOrder,
        tensors: Sequence[WantedTensor],
        on_progress: Callable[[int, int], None],
    ) -> None:
        """A whole copy, in two steps."""
        self.asked.append([tensor.name for tensor in tensors])
        on_progress(1, 2)
        await trio.testing.wait_all_tasks_blocked()
        shutil.copy(self.source, self.models / "small.gguf")
        on_progress(2, 2)
        await trio.testing.wait_all_tasks_blocked()

    async def match(self, order: bytes, fetch: Fetch | None) -> Matched:
        ours, theirs = trio.testing.memory_stream_pair()
        matching = Matching(Shelf((self.models,), self.folder / "manifests"), fetch)

        async def listen() -> None:
            messages = MessageStream(theirs)
            with suppress(trio.ClosedResourceError):
                while (message := await messages.receive_or_end_untrusted()) is not None:
                    self.told.append(parse_progress_untrusted(message))

        async with bare_nursery() as nursery:
            nursery.start_soon(listen)
            wanted = manifest_to_wire(self.manifest)
            try:
                return await matching.match(OWNER, "small", wanted, order, MessageStream(ours))
            finally:
                await ours.aclose()

    def order(self, *names: str) -> bytes:
        known = [tensor.name for tensor in self.manifest.tensors]
        needed = tuple(sorted(known.index(name) for name in names))
        return to_wire(PullOrder("https://example.org/small.gguf", "0f" * 32, needed))


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    source = make_model(tmp_path / "small.gguf", layers=2, width=64, ffn=64)
    for name in ("models", "manifests"):
        (tmp_path / name).mkdir()
    return Worker(tmp_path, source, digest_model(read_facts(source)))


NEEDED = ("blk.1.attn_q.weight", "output_norm.weight")


async def test_what_is_ordered_and_not_there_is_pulled(worker: Worker) -> None:
    matched = await worker.match(worker.order(*NEEDED), worker.fetch)
    assert [sorted(names) for names in worker.asked] == [sorted(NEEDED)]
    digests = {tensor.name: tensor.digest for tensor in worker.manifest.tensors}
    assert matched.digests == pack_digests([digests[name] for name in sorted(NEEDED)])
    assert Progress(1, 2, pulls=True) in worker.told
    assert set(NEEDED) <= matched.local.usable.keys()


async def test_what_is_there_is_not_pulled(worker: Worker) -> None:
    shutil.copy(worker.source, worker.models / "mine.gguf")
    matched = await worker.match(worker.order(*NEEDED), worker.fetch)
    assert worker.asked == []
    assert len(matched.digests) == 32 * len(NEEDED)


async def test_without_an_order_nothing_is_pulled(worker: Worker) -> None:
    matched = await worker.match(b"", worker.fetch)
    assert (worker.asked, matched.digests) == ([], b"")
    assert matched.local.missing_count == len(worker.manifest.tensors)


async def test_a_worker_that_pulls_nothing_says_so(worker: Worker) -> None:
    with pytest.raises(ResourceError, match="--allow-pull"):
        await worker.match(worker.order(*NEEDED), None)


async def test_a_pull_that_fails_is_the_lease_s_end(worker: Worker) -> None:
    async def fails(*_: object) -> None:
        raise NetworkError("the source is not there")

    with pytest.raises(NetworkError, match="not there"):
        await worker.match(worker.order(*NEEDED), fails)


async def test_what_was_pulled_and_vanished_is_no_grant(worker: Worker) -> None:
    async def pulls_nothing(*_: object) -> None:
        pass

    with pytest.raises(ResourceError, match="gone again"):
        await worker.match(worker.order(*NEEDED), pulls_nothing)


async def test_an_order_of_another_model_s_tensors_is_refused(worker: Worker) -> None:
    beyond = PullOrder("https://example.org/small.gguf", "0f" * 32, (10**6,))
    with pytest.raises(BadMessage):
        await worker.match(to_wire(beyond), worker.fetch)
