"""Members that hold models, and one that pulls from them, as endpoints on loopback."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from meshnode.models.cache import ManifestCache
from meshnode.models.catalog import Catalog
from meshnode.models.facts import read_facts
from meshnode.models.fetching import Fetcher
from meshnode.models.peers.directory import Directory
from meshnode.models.peers.offers import Offers
from meshnode.models.peers.service import StoreService
from meshnode.models.peers.source import Holders
from meshnode.models.pull.source import RangeSource, SourceFault
from meshnode.models.registry import Registry
from meshnode.models.store.slice import Slice
from meshnode.models.store.store import Store
from meshnode.pipeline.pulling import Puller
from tests.lab.sources import FileSource
from tunnels import Endpoint, Identity, Session


@dataclass
class Machine:
    """A node's models: slices in `folder/models`, whole files in `folder/files`."""

    name: str
    folder: Path
    endpoint: Endpoint = field(default_factory=lambda: _endpoint())

    def __post_init__(self) -> None:
        for name in ("models", "files", "manifests"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.store = Store(self.folder / "models")
        self.cache = ManifestCache(self.folder / "manifests")
        folders = (self.folder / "models", self.folder / "files")
        self.offers = Offers(self.store, Registry(Catalog(folders), self.cache), clock=lambda: 0.0)
        self.look_again()

    def look_again(self) -> None:
        """Questions of members are answered by the listing of a few seconds ago."""
        self.offers._looked_at = None

    def has_whole(self, model: Path, *, digested: bool = False) -> Path:
        path = self.folder / "files" / model.name
        path.write_bytes(model.read_bytes())
        if digested:
            self.cache.manifest(read_facts(path))
        self.look_again()
        return path

    def has_in_ollama(self, model: Path, name: str) -> Path:
        """As `ollama pull` leaves it."""
        folder = self.folder / "files" / "ollama"
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
        blob = folder / "blobs" / f"sha256-{digest}"
        manifest = folder / "manifests" / "registry.ollama.ai" / "library" / name / "latest"
        for path in (blob, manifest):
            path.parent.mkdir(parents=True)
        blob.write_bytes(model.read_bytes())
        layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
        manifest.write_text(json.dumps({"layers": [layer]}))
        self.look_again()
        return blob

    async def holds(self, model: Path, *names: str) -> Slice:
        """These tensors, pulled from a file as if it lay on the web."""
        source = FileSource(model)
        fetcher = Fetcher(self.store, source.open)
        part = await fetcher.obtain(f"https://example.org/{model.name}")
        await fetcher.fetch(part, names, {}, lambda _done, _total: None)
        self.look_again()
        (found,) = self.store.slices()
        return found


@dataclass
class Circle:
    """One that asks, and its members, the nearest of whom is not known."""

    asker: Machine
    members: Sequence[Machine]
    sessions: list[Session]

    @property
    def directory(self) -> Directory:
        return Directory(self._sessions, self._name, self.asker.offers.listed, self.asker.name)

    @property
    def puller(self) -> Puller:
        """What the asker's node has, with no web to ask."""
        holders = Holders(self._sessions, self._name)
        fetcher = Fetcher(self.asker.store, _no_web, holders.find)
        return Puller(fetcher, self.asker.store, self.directory, self.asker.offers)

    def _sessions(self) -> list[Session]:
        return [one for one in self.sessions if not one.closed.is_set()]

    def _name(self, session: Session) -> str:
        names = {member.endpoint.peer: member.name for member in self.members}
        return names[session.peer]


@asynccontextmanager
async def circle(folder: Path, *names: str) -> AsyncIterator[Circle]:
    """`ann` asks members of these names."""
    asker = Machine("ann", folder / "ann")
    members = [Machine(name, folder / name) for name in names]
    async with trio.open_nursery() as nursery:
        await nursery.start(asker.endpoint.run, "127.0.0.1", 0)
        sessions = []
        for member in members:
            StoreService(member.offers).offer(member.endpoint)
            await nursery.start(member.endpoint.run, "127.0.0.1", 0)
            candidates = member.endpoint.candidates()
            sessions.append(await asker.endpoint.connect(member.endpoint.peer, candidates))
        yield Circle(asker, members, sessions)
        nursery.cancel_scope.cancel()


def _endpoint() -> Endpoint:
    return Endpoint(Identity.generate(), authorize=lambda _peer, _service: True)


def _no_web(reference: str) -> AbstractAsyncContextManager[RangeSource]:
    raise SourceFault(f"nobody answers at {reference}")
