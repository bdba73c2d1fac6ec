"""Members with models, and one that asks them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
import trio.testing

from meshnode.models.fetching import Fetcher
from meshnode.models.peers.offers import Offers
from meshnode.models.peers.service import StoreService
from meshnode.models.peers.source import Holders, PeerSource
from meshnode.models.store.slice import Slice
from meshnode.models.store.store import Store
from tests.engine.synthetic import make_model
from tests.lab.sources import FileSource
from tunnels import Endpoint, Identity, Session

REFERENCE = "https://example.org/small.gguf"


FIRST = ("blk.0.attn_q.weight", "blk.0.ffn_up.weight")


SECOND = ("blk.1.attn_q.weight", "blk.1.ffn_up.weight")


@dataclass
class Member:
    """A node with a store, and how the asker reaches it."""

    endpoint: Endpoint
    store: Store
    session: Session

    def slice(self) -> Slice:
        (found,) = self.store.slices()
        return found

    async def as_source(self) -> PeerSource:
        """Of what it holds, for the asker."""
        provisional = self.slice().identity.provisional
        (found,) = await Holders(lambda: [self.session], lambda _: "ben").find(provisional)
        return found


@dataclass
class Scene:
    folder: Path
    source: FileSource
    members: list[Member]

    @property
    def fetcher(self) -> Fetcher:
        """Of the asker, whose store is its own."""
        holders = Holders(lambda: [member.session for member in self.members], lambda _: "ben")
        return Fetcher(Store(self.folder / "asker"), self.source.open, holders.find)

    async def hold(self, member: Member, *names: str) -> Slice:
        """The member has these of the model."""
        fetcher = Fetcher(member.store, self.source.open)
        part = await fetcher.obtain(REFERENCE)
        await fetcher.fetch(part, names, {}, lambda _done, _total: None)
        self.source.asked.clear()
        return member.slice()


@asynccontextmanager
async def scene(folder: Path, count: int = 1) -> AsyncIterator[Scene]:
    (folder / "served").mkdir()
    path = make_model(folder / "served" / "small.gguf", layers=3, width=512, ffn=1024)
    asker = Endpoint(Identity.generate(), authorize=lambda _peer, _service: False)
    async with trio.open_nursery() as nursery:
        await nursery.start(asker.run, "127.0.0.1", 0)
        stage = Scene(folder, FileSource(path), [])
        for number in range(count):
            endpoint = Endpoint(Identity.generate(), authorize=lambda _peer, _service: True)
            store = Store(folder / f"member-{number}")
            StoreService(Offers(store)).offer(endpoint)
            await nursery.start(endpoint.run, "127.0.0.1", 0)
            session = await asker.connect(endpoint.peer, endpoint.candidates())
            stage.members.append(Member(endpoint, store, session))
        yield stage
        nursery.cancel_scope.cancel()


async def fetch(stage: Scene, part: Slice, *names: str) -> set[str]:
    manifest = await stage.fetcher.fetch(part, names, {}, lambda _done, _total: None)
    return {tensor.name for tensor in manifest.tensors}
