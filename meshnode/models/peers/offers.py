"""What of this node's disk its members may have: its slices, and the models that are whole here.

Names and identities are compared with what was found in the node's own folders; nothing that a
member says is ever looked up on the disk. Everything here blocks for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from meshnode.errors import ModelError
from meshnode.models.facts import ModelFacts
from meshnode.models.peers.listing import Listed
from meshnode.models.registry import KnownModel, Registry, Summary
from meshnode.models.spans import Span, joined
from meshnode.models.store.index import IdentityIndex, Stamp, document_stamp
from meshnode.models.store.slice import Slice, is_as_told, open_slice
from meshnode.models.store.store import Store

LOOK_AGAIN_S = 5.0
"""How old a listing may be: a walk over the folders is not to be had for every question."""
SLICES_KEPT = 16


@dataclass(frozen=True)
class Offer:
    """A model, or a part of one, as members may read it. `files`: names and lengths. `digests`:
    of tensors, those that are known. `is_unchanged`: whether nobody has written to its files since
    it was found; of a slice nobody does where bytes are held."""

    facts: ModelFacts
    files: tuple[tuple[str, int], ...]
    validator: str
    spans: tuple[Span, ...]
    root: str | None
    digests: Mapping[str, bytes]
    is_unchanged: Callable[[], bool] = lambda: True

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.facts.files

    def all_digests(self) -> bytes:
        """In the order of the tensors' names; nothing where one is not known."""
        names = sorted(tensor.name for tensor in self.facts.tensors)
        if any(name not in self.digests for name in names):
            return b""
        return b"".join(self.digests[name] for name in names)


@dataclass(frozen=True)
class _KnownSlice:
    """One as it was when it was opened: its header is not read again for each range of it."""

    slice: Slice
    offer: Offer
    stamp: Stamp | None

    def is_current(self) -> bool:
        return self.stamp is not None and self.stamp == document_stamp(self.slice.folder)

    def is_as_told(self) -> bool:
        try:
            return is_as_told(self.slice)
        except ModelError:
            return False  # gone meanwhile


class Offers:
    """I find what is asked for. To be called from threads."""

    def __init__(
        self,
        store: Store,
        registry: Registry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """registry: of the node's models; None: its slices alone are given."""
        self._store = store
        self._index = IdentityIndex(store)
        self._registry = registry
        self._clock = clock
        self._slices: dict[str, _KnownSlice] = {}
        self._lock = threading.Lock()
        self._found: list[Summary] = []
        self._looked_at: float | None = None
        self._changes = self._seen_changes = 0

    def find(self, identity: str) -> Offer | None:
        """By root or provisional identity."""
        known = self._slices.get(identity)
        if known is None or not known.is_current():
            self._slices.pop(identity, None)
            known = self._look_up(identity)
        # What was written to without a word of it must be read again first, which a start does.
        if known is not None and known.is_as_told():
            return known.offer
        return self._whole(identity)

    def _look_up(self, identity: str) -> _KnownSlice | None:
        for folder in self._index.folders_of(identity):
            stamp = document_stamp(folder)
            try:
                found = open_slice(folder)  # no older than the stamp
            except ModelError:
                continue
            if len(self._slices) >= SLICES_KEPT:
                self._slices.clear()
            known = self._slices[identity] = _KnownSlice(found, _of_slice(found), stamp)
            return known
        return None

    def listed(self) -> list[Listed]:
        """All that is here and can be read, by name."""
        return [
            _listed(one)
            for one in self._models()
            if one.model is not None and (one.held is None or self._is_ours(one))
        ]

    def look_again(self) -> None:
        """Something was pulled, and is to be given from now on. Does not block."""
        self._changes += 1

    def _is_ours(self, one: Summary) -> bool:
        """A slice below a folder of --models is another home's, whose node gives it."""
        return one.entry.path.parent.parent == self._store.folder

    def _whole(self, identity: str) -> Offer | None:
        if self._registry is None:
            return None
        for one in self._models():
            if one.is_named(identity) and one.held is None:
                known = self._registry.find_again(one)
                if known is not None and known.part is None and self._registry.is_as_found(known):
                    return _of_whole(known, partial(self._registry.is_as_found, known))
        return None

    def _models(self) -> list[Summary]:
        if self._registry is None:
            return []
        with self._lock:
            now = self._clock()
            is_old = self._looked_at is None or now - self._looked_at >= LOOK_AGAIN_S
            if is_old or self._changes != self._seen_changes:
                self._seen_changes = self._changes  # those of meanwhile are for the next look
                try:
                    self._found = self._registry.models()
                except ModelError:
                    self._found = []  # a folder of --models is gone: `mesh models` tells of it
                self._looked_at = now
            return self._found


def held_spans(found: Slice) -> tuple[Span, ...]:
    """The bytes that a slice holds, its headers among them."""
    facts = found.facts
    firsts = {
        index: min((t.offset for t in facts.tensors if t.file_index == index), default=size_bytes)
        for index, (_, size_bytes) in enumerate(found.document.files)
    }
    headers = [Span(index, 0, first) for index, first in firsts.items() if first]
    held = [
        Span(tensor.file_index, tensor.offset, tensor.offset + tensor.nbytes)
        for tensor in found.held
        if tensor.nbytes
    ]
    return joined([*headers, *held])


def _of_slice(found: Slice) -> Offer:
    document = found.document
    return Offer(
        found.facts,
        document.files,
        document.validator,
        held_spans(found),
        document.root,
        document.digests,
    )


def _of_whole(known: KnownModel, is_unchanged: Callable[[], bool]) -> Offer:
    names = [path.name for path in known.facts.files]
    if len(names) == 1 and not names[0].endswith(".gguf"):  # a blob of Ollama's
        stem = "".join("-" if letter in "/:\\" else letter for letter in known.entry.name)
        names = [f"{stem.lstrip('.')}.gguf"]
    return Offer(
        known.facts,
        tuple(zip(names, known.sizes, strict=True)),
        known.validator,
        tuple(Span(index, 0, size_bytes) for index, size_bytes in enumerate(known.sizes)),
        known.identity.root,
        known.digests,
        is_unchanged,
    )


def _listed(one: Summary) -> Listed:
    assert one.identity is not None
    assert one.model is not None
    weight_bytes = one.model["weight_bytes"]
    assert isinstance(weight_bytes, int)
    place = [f"{one.entry.place}/{one.entry.name}"] if one.entry.place else []
    return Listed(
        one.entry.name,
        (*one.entry.aliases, *place),
        one.identity.provisional,
        one.identity.root,
        weight_bytes,
        one.held_bytes,
    )
