"""A node with models and a gateway before them, without a mesh behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import trio

from meshnode.errors import UsageError
from meshnode.gateway.model_pull import Pulls
from meshnode.gateway.model_routes import ModelRoutes
from meshnode.gateway.server import serve_gateway
from meshnode.models.cache import ManifestCache
from meshnode.models.catalog import Catalog
from meshnode.models.fetching import Fetcher, OnProgress
from meshnode.models.identity import Identity
from meshnode.models.peers.overview import Model, Overview, Share
from meshnode.models.pull.source import SourceFile
from meshnode.models.registry import Registry
from meshnode.models.spans import Span
from meshnode.models.store.store import Store
from meshnode.models.store.writer import SliceWriter
from meshnode.pipeline.commission import Held
from meshnode.pipeline.orders import Orders, Target
from meshnode.pipeline.pulling import Puller
from meshnode.pipeline.user_pulls import UserPulls
from tests.engine.synthetic import make_model
from tests.lab.sources import FileSource
from tests.meshnode.gateway.node_view import SettableNode
from tests.meshnode.models.store.slices import Whole, pull

KEY = "mesh-key-" + "k" * 43
ROOT = "/api/v1/models"


@dataclass(frozen=True)
class Unread:
    """What somebody holds of files, of which nothing is read."""

    files: tuple[SourceFile, ...]
    holds: tuple[Span, ...]
    title: str = "tower"
    validator: str = ""
    is_sequential: bool = False
    rtt_s: float | None = None

    async def read(
        self, file_index: int, start: int, stop: int, into: Callable[[memoryview], None]
    ) -> None:
        raise AssertionError("nobody reads here")


@dataclass
class Tower:
    """Another node, called tower, that pulls when it is told to go on. `asked`: source and layers,
    of each pull; `left`: one was given up."""

    asked: list[tuple[str, str | None]] = field(default_factory=list)
    begun: trio.Event = field(default_factory=trio.Event)
    go_on: trio.Event = field(default_factory=trio.Event)
    failure: Exception | None = None
    left: trio.Event = field(default_factory=trio.Event)
    done: trio.Event = field(default_factory=trio.Event)
    names: tuple[str, ...] = ("tower", "peer-of-tower")

    def find(self, node: str) -> Target:
        if node not in self.names:
            raise UsageError(f"there is no peer {node!r}: `mesh members` lists those known")
        return Target("tower", "peer-of-tower")

    async def pull(
        self, node: str, source: str, layers: str | None, on_progress: OnProgress
    ) -> Held:
        self.find(node)
        self.asked.append((source, layers))
        on_progress(1, 2)
        self.begun.set()
        try:
            await self.go_on.wait()
        except trio.Cancelled:
            self.left.set()
            raise
        if self.failure is not None:
            raise self.failure
        for done_bytes in range(10_000):
            on_progress(done_bytes, 10_000)
        self.done.set()
        return Held("far", "f" * 64, 2, 2, 2, complete=True, proof="word")


class ModelNode:
    """A node with models, and a gateway before them. `http` shows the key."""

    def __init__(self, home: Path, http: httpx.AsyncClient, web: FileSource) -> None:
        self.home = home
        self.http = http
        self.web = web
        self.there: list[list[Share]] = []
        self.elsewhere: list[Model] = []
        self.asked: list[str] = []
        self.tower = Tower()

    async def look_around(self, own: Sequence[Identity]) -> Overview:
        """`there`: shares of each of the models that are here."""
        self.asked += map(str, own)
        shares = [*self.there, *([] for _ in own)]
        here = [Model((), one.provisional, one.root, shares.pop(0)) for one in own]
        return Overview(here, self.elsewhere, all_said=True)

    def put(self, name: str = "m.gguf", **changes: Any) -> Path:
        """A whole model among the node's."""
        shape: dict[str, Any] = {"layers": 2, "width": 64, "vocab": 300, "heads": 2, "ffn": 64}
        return make_model(self.home / "models" / name, **(shape | changes))

    def put_part(self, whole: Whole, names: Sequence[str]) -> None:
        """A slice of a model, with these tensors."""
        part = whole.create(Store(self.home / "models"))
        writer = SliceWriter(part.folder)
        pull(writer, whole, names)
        writer.close()

    async def data(self, name: str = "m", **headers: str) -> httpx.Response:
        known = {key.replace("_", "-"): value for key, value in headers.items()}
        return await self.http.get(f"{ROOT}/{name}/data", headers=known)


@asynccontextmanager
async def open_model_node(home: Path) -> AsyncIterator[ModelNode]:
    """With no models yet; its only source on the web is `node.web`."""
    for name in ("models", "manifests", "web"):
        (home / name).mkdir()
    made = make_model(home / "web" / "far.gguf", layers=3, width=256, ffn=512)
    source = FileSource(made)
    headers = {"authorization": f"Bearer {KEY}"}
    async with (
        httpx.AsyncClient(headers=headers, timeout=30, trust_env=False) as http,
        trio.open_nursery() as nursery,
    ):
        node = ModelNode(home, http, source)
        store = Store(home / "models")
        fetcher, orders = Fetcher(store, source.open), cast(Orders, node.tower)
        routes = ModelRoutes(
            Registry(Catalog([home / "models"]), ManifestCache(home / "manifests")),
            node.look_around,
            Pulls(UserPulls("attic", "peer-of-attic", Puller(fetcher, store), orders), orders),
            Target("attic", "peer-of-attic"),
            KEY,
        ).routes()
        port = await nursery.start(serve_gateway, SettableNode(), "127.0.0.1", 0, routes)
        http.base_url = httpx.URL(f"http://127.0.0.1:{port}")
        yield node
        nursery.cancel_scope.cancel()


async def listed(node: ModelNode, query: str = "") -> list[dict[str, Any]]:
    answer = await node.http.get(f"{ROOT}/registry{query}")
    assert answer.status_code == 200
    return list(answer.json()["models"])
