"""A worker fetches what an orchestrator asks it to, as far as its operator allows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from meshnode.config import PullSource
from meshnode.errors import NetworkError, ResourceError
from meshnode.models.facts import read_facts
from meshnode.models.fetching import Fetcher
from meshnode.models.manifest import WantedTensor, digest_model
from meshnode.models.store.store import Store
from meshnode.models.web import kind_of
from meshnode.pipeline.errand import Errand
from meshnode.pipeline.pull_order import PullOrder
from meshnode.pipeline.quota import Quota
from tests.engine.synthetic import make_model
from tests.lab.sources import FileSource
from tunnels import PeerId

REFERENCE = "https://example.org/small.gguf"
ASKER = PeerId(bytes(32))
NEEDED = ("blk.1.attn_q.weight", "output_norm.weight")


@dataclass
class Scene:
    source: FileSource
    store: Store
    provisional: str

    async def fetch(
        self,
        *,
        allowed: frozenset[PullSource] = frozenset((PullSource.URL,)),
        provisional: str = "",
        digests: bool = False,
        reference: str = REFERENCE,
    ) -> None:
        fetcher = Fetcher(self.store, self.source.open)
        errand = Errand("ben", self.store, fetcher, allowed, kind_of, Quota(self.store))
        wanted = [
            WantedTensor(one.name, one.type, one.ne, one.nbytes, one.digest if digests else None)
            for one in digest_model(read_facts(self.source.path)).tensors
            if one.name in NEEDED
        ]
        order = PullOrder(reference, provisional or self.provisional, ())
        await errand.fetch(ASKER, order, wanted, lambda _done, _total: None)

    def held(self) -> set[str]:
        return {tensor.name for found in self.store.slices() for tensor in found.held}


@pytest.fixture
async def scene(tmp_path: Path) -> Scene:
    (tmp_path / "served").mkdir()
    path = tmp_path / "served" / "small.gguf"
    source = FileSource(make_model(path, layers=2, width=512, ffn=1024))
    seen = await Fetcher(Store(tmp_path / "orchestrator"), source.open).obtain(REFERENCE)
    source.asked.clear()
    return Scene(source, Store(tmp_path / "worker"), seen.identity.provisional)


@pytest.mark.parametrize("digests", [False, True])
async def test_it_has_what_it_was_asked_to_have(scene: Scene, digests: bool) -> None:
    await scene.fetch(digests=digests)
    assert scene.held() == set(NEEDED)


async def test_what_it_has_is_not_fetched_again_source_or_no_source(scene: Scene) -> None:
    await scene.fetch()
    scene.source.is_there = False
    await scene.fetch()
    assert scene.held() == set(NEEDED)


async def test_what_its_operator_does_not_allow_is_not_fetched(scene: Scene) -> None:
    allowed = frozenset((PullSource.HUB, PullSource.PEERS))
    with pytest.raises(ResourceError, match=r"ben lacks .* start it with --allow-pull url"):
        await scene.fetch(allowed=allowed)
    assert scene.source.asked == []


async def test_another_file_than_the_orchestrator_saw_is_refused(scene: Scene) -> None:
    scene.source.version = "etag:2"
    with pytest.raises(NetworkError, match=r"another file at https://example\.org/small\.gguf"):
        await scene.fetch()
    assert scene.store.folders() == [], "no header of what was begun in vain"


async def test_what_members_are_to_give_is_asked_of_nobody_else(scene: Scene) -> None:
    with pytest.raises(ResourceError, match="from other members: start it with --allow-pull peers"):
        await scene.fetch(reference="mesh:small")
    with pytest.raises(
        NetworkError, match="no member that ben is connected to gives it mesh:small"
    ):
        await scene.fetch(reference="mesh:small", allowed=frozenset((PullSource.PEERS,)))
    assert scene.source.asked == []
