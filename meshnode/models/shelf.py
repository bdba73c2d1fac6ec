"""The models of one node, for the rest of the node: by name, by digest, without blocking trio."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from meshnode.errors import ModelError
from meshnode.models.cache import ManifestCache
from meshnode.models.catalog import Catalog
from meshnode.models.facts import ModelFacts, read_facts
from meshnode.models.manifest import (
    DigestCancelled,
    Manifest,
    Match,
    WantedModel,
    engine_manifest,
    match,
)
from meshnode.models.manifest import Progress as Report
from meshnode.models.registry import Registry
from meshnode.models.store.slice import held_manifest, refuse_part, slice_of

T = TypeVar("T")

DEMO_MODEL = Path(__file__).parent.parent / "demo" / "mesh-demo.gguf"
PROGRESS_STEP_BYTES = 64 * 2**20
MAX_DIGESTED = 4
"""Files a worker reads whole, at most, to find one model: models of one shape may be many."""


class Progress:
    """How far a digest is, from its thread to whoever waits. The newest word replaces the last."""

    def __init__(self) -> None:
        self._latest: tuple[int, int] | None = None
        self._news = trio.Event()
        self._told_bytes = 0

    def report(self, done_bytes: int, total_bytes: int) -> None:
        """From the digest's thread; about one word in 64 MiB gets through."""
        if done_bytes < self._told_bytes:
            self._told_bytes = 0  # the next file
        if done_bytes < total_bytes and done_bytes - self._told_bytes < PROGRESS_STEP_BYTES:
            return
        self._told_bytes = done_bytes
        trio.from_thread.run_sync(self.tell, done_bytes, total_bytes)

    def tell(self, done_bytes: int, total_bytes: int) -> None:
        """From trio's thread, as often as one likes."""
        self._latest = done_bytes, total_bytes
        self._news.set()

    async def next(self) -> tuple[int, int]:
        """(done, total) bytes, once there is a new word."""
        await self._news.wait()
        self._news = trio.Event()
        assert self._latest is not None
        return self._latest


@dataclass(frozen=True)
class LocalMatch:
    """A wanted model against our files: digests of what is usable, by name. `engine_manifest` is
    what rpc-server may read."""

    usable: Mapping[str, bytes]
    missing_count: int
    differing: tuple[str, ...]
    engine_manifest: str


class Shelf:
    """I find models in this node's folders and know their digests."""

    def __init__(self, folders: Sequence[Path], manifest_folder: Path) -> None:
        demo = (DEMO_MODEL.parent,) if DEMO_MODEL.is_file() else ()
        self.folders = (*folders, *demo)
        self._catalog = Catalog(self.folders)
        self._catalog.scan()
        self._cache = ManifestCache(manifest_folder)

    def registry(self) -> Registry:
        """The same models, for whoever asks from outside."""
        return Registry(Catalog(self.folders), self._cache)

    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self._catalog.models() if entry.complete)

    def find(self, text: str | None, *, whole: bool = True) -> ModelFacts:
        """The model `text` names or points to; None: the demo model. Blocks for its header.

        Raises `ModelError`; `IsASlice` where only a part of the model is here and `whole` is asked
        for: read as it is, the rest would be zeros.
        """
        if text is None:
            return read_facts(DEMO_MODEL)
        path = self._catalog.resolve(text)
        found = slice_of(path)
        if found is None:
            return read_facts(path)
        if whole:
            refuse_part(path)
        return found.facts

    async def manifest(self, facts: ModelFacts, progress: Progress | None = None) -> Manifest:
        """The model's digests, made now if they are not known. Raises `ModelError`."""
        report = progress.report if progress else None
        return await _in_thread(lambda unwanted: self._manifest(facts, report, unwanted))

    def _manifest(
        self, facts: ModelFacts, progress: Report | None, cancelled: Callable[[], bool]
    ) -> Manifest:
        """What there is of the model: of a slice what it holds, which nobody has to read again."""
        found = slice_of(facts.path)
        if found is not None:
            return held_manifest(found, progress, cancelled)
        return self._cache.manifest(facts, progress, cancelled)

    async def match(self, wanted: WantedModel, name: str, progress: Progress) -> LocalMatch:
        """The file of ours that holds the most of a wanted model, checked byte for byte.

        `name` is what the asker calls the model: files of that name are looked at first.
        """
        return await _in_thread(partial(self._best_match, wanted, name, progress))

    def _best_match(
        self, wanted: WantedModel, name: str, progress: Progress, cancelled: Callable[[], bool]
    ) -> LocalMatch:
        best = Match((), (), tuple(tensor.name for tensor in wanted.tensors))
        text = ""
        for facts in self._likely(wanted, name):
            try:
                manifest = self._manifest(facts, progress.report, cancelled)
                same = self._is_known_as(wanted.root, facts)
                found = match(wanted.tensors, manifest, same_source=same)
                offer = engine_manifest(wanted.root, manifest, found.usable)
            except ModelError:
                continue  # written to, gone, or of an impossible name: as good as not there
            if not text or len(found.usable) > len(best.usable):
                best, text = found, offer
            if len(best.usable) == len(wanted.tensors):
                break
        usable = {tensor.name: tensor.digest for tensor in best.usable}
        return LocalMatch(usable, len(best.missing), best.differing, text)

    def _likely(self, wanted: WantedModel, name: str) -> list[ModelFacts]:
        """The few files worth digesting: those known to be the model, those of its name, others."""
        self._catalog.scan()

        def unlikeliness(facts: ModelFacts) -> tuple[bool, bool]:
            return not self._is_known_as(wanted.root, facts), facts.name != name

        return sorted(self._catalog.holding(wanted.tensors), key=unlikeliness)[:MAX_DIGESTED]

    def _is_known_as(self, root: str, facts: ModelFacts) -> bool:
        """Whether it is the model of that root, or that provisional one, as far as that is known
        without reading a weight."""
        try:
            found = slice_of(facts.path)
        except ModelError:
            return False
        if found is not None:
            return found.identity.is_named(root)
        kept = self._cache.get(facts)
        return kept is not None and kept.root == root


async def _in_thread(work: Callable[[Callable[[], bool]], T]) -> T:
    """Runs blocking work that asks now and then whether it is still wanted."""
    unwanted = threading.Event()

    def run() -> T | None:
        try:
            return work(unwanted.is_set)
        except DigestCancelled:
            return None

    try:
        result = await trio.to_thread.run_sync(run, abandon_on_cancel=True)
    finally:
        unwanted.set()
    assert result is not None
    return result
