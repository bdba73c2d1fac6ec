"""The models of this node for whoever asks from outside: by identity or name, and nothing else.

What is asked for is compared with what was found in the node's folders, never looked up on the
disk. Headers are read once, until a file changes; everything here blocks for the disk.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshnode.errors import AmbiguousModel, ModelError, NoSuchModel
from meshnode.models.cache import ManifestCache
from meshnode.models.caches import sha256_of_name
from meshnode.models.catalog import Catalog, CatalogEntry
from meshnode.models.facts import ModelFacts, facts_of, shard_paths, shown_name
from meshnode.models.header_bounds import read_headers
from meshnode.models.identity import Identity, provisional_identity
from meshnode.models.manifest import FileStamp, stamp
from meshnode.models.slice_mark import SLICE_DOCUMENT
from meshnode.models.store.slice import Slice, slice_of

MAX_OPENED = 8
"""Models whose tensors are kept in memory; of the others a few facts are."""
_IDENTITY_CHARS = 64
_DEFAULT_ALIGNMENT = 32

Stamps = tuple[tuple[int, int, int], ...]


class ModelUnusable(ModelError):
    """It is here, and cannot be read."""


class ModelChanging(ModelError):
    """Its files are being written to."""


@dataclass(frozen=True)
class KnownModel:
    """A model as it is on the disk now. `part`: where it is a slice. `validator`: what tells these
    files from others of that header (`meshnode.models.identity`). `alignments`: of each file.
    `digests`: of tensors, those that are known; `stamps` change when any of that does."""

    entry: CatalogEntry
    facts: ModelFacts
    part: Slice | None
    identity: Identity
    validator: str
    digests: Mapping[str, bytes]
    alignments: tuple[int, ...]
    sizes: tuple[int, ...]
    stamps: Stamps

    @property
    def held(self) -> frozenset[str] | None:
        """Names of the tensors that are here; None: all."""
        if self.part is None or len(self.part.held) == len(self.facts.tensors):
            return None
        return self.part.document.held


@dataclass(frozen=True)
class Summary:
    """What is kept of each model. `model` is what the listing says; None: it cannot be read."""

    entry: CatalogEntry
    stamps: Stamps
    identity: Identity | None = None
    model: Mapping[str, object] | None = None
    held: tuple[str, ...] | None = None
    held_bytes: int = 0

    def is_named(self, text: str) -> bool:
        return self.identity is not None and self.identity.is_named(text)


class Registry:
    """I know the models of this node. To be called from threads."""

    def __init__(self, catalog: Catalog, digests: ManifestCache) -> None:
        self._catalog = catalog
        self._digests = digests
        self._lock = threading.Lock()
        self._summaries: dict[Path, Summary] = {}
        self._opened: OrderedDict[Path, KnownModel] = OrderedDict()

    def models(self) -> list[Summary]:
        """All there are now, by name. Raises `ModelError` for a folder that is gone."""
        with self._lock:
            self._look_again()
            return list(self._summaries.values())

    def find(self, text: str) -> KnownModel:
        """By root, provisional identity or name. Raises `NoSuchModel`, `AmbiguousModel`,
        `ModelUnusable`."""
        with self._lock:
            known = self._known_still(text)
            if known is None:
                self._look_again()
                known = self._named(text)
            if known is None:
                raise NoSuchModel(
                    f"no model here is called {shown_name(text)!r}: /api/v1/models/registry lists "
                    "those that are"
                )
            if known.model is None:
                raise ModelUnusable(
                    f"{known.entry.name} is here and cannot be read: `mesh models info` on the "
                    "node's machine says why"
                )
            return self._open(known.entry, known.stamps)

    def find_again(self, one: Summary) -> KnownModel | None:
        """All of a model that was listed, unless it is another by now."""
        with self._lock:
            try:
                return self._open(one.entry, one.stamps)
            except ModelError:
                return None

    def is_as_found(self, model: KnownModel) -> bool:
        """Whether nothing of it has changed since."""
        return self._stamps(model.entry) == model.stamps

    def _known_still(self, text: str) -> Summary | None:
        """Without a walk over the folders: whoever reads range by range asks often."""
        try:
            known = self._named(text)
        except AmbiguousModel:
            return None
        unchanged = known is not None and known.stamps == self._stamps(known.entry)
        return known if unchanged else None

    def _named(self, text: str) -> Summary | None:
        wanted = text.casefold()
        summaries = self._summaries.values()
        found = [one for one in summaries if wanted in one.entry.names]
        if len(wanted) == _IDENTITY_CHARS:
            found = [one for one in summaries if one.is_named(wanted)] or found
        found = [one for one in found if one.entry.complete] or found
        if len({str(one.identity or one.entry.path) for one in found}) > 1:
            known = ", ".join(str(one.identity) for one in found if one.identity)
            raise AmbiguousModel(
                f"several models here are called {shown_name(text)!r}: ask by identity: {known}"
            )
        return found[0] if found else None

    def _look_again(self) -> None:
        before, self._summaries = self._summaries, {}
        for entry in self._catalog.scan():
            stamps, kept = self._stamps(entry), before.get(entry.path)
            if kept is not None and kept.stamps == stamps and kept.entry == entry:
                self._summaries[entry.path] = kept
            else:
                self._summaries[entry.path] = self._summary(entry, stamps)

    def _stamps(self, entry: CatalogEntry) -> Stamps:
        """Of all that a model is made of here, and of what tells its digests."""
        document = entry.path.parent / SLICE_DOCUMENT
        digests = self._digests.entry_path(entry.path)
        return tuple(map(_stamp, (*shard_paths(entry.path), document, digests)))

    def _summary(self, entry: CatalogEntry, stamps: Stamps) -> Summary:
        try:
            known = self._open(entry, stamps)
        except ModelError:
            return Summary(entry, stamps)
        facts, held = known.facts, known.held
        model = model_row(
            facts, known.identity, entry.name, entry.aliases, files_of(known), entry.source
        )
        names = tuple(t.name for t in facts.tensors if held is not None and t.name in held)
        held_bytes = known.part.held_bytes if known.part else facts.weight_bytes
        tensors = None if held is None else names
        return Summary(entry, stamps, known.identity, model, tensors, held_bytes)

    def _open(self, entry: CatalogEntry, stamps: Stamps) -> KnownModel:
        kept = self._opened.pop(entry.path, None)
        if kept is None or kept.stamps != stamps or kept.entry != entry:
            kept = self._read(entry, stamps)
        self._opened[entry.path] = kept
        if len(self._opened) > MAX_OPENED:
            self._opened.popitem(last=False)
        return kept

    def _read(self, entry: CatalogEntry, stamps: Stamps) -> KnownModel:
        headers = read_headers(shard_paths(entry.path))
        part = slice_of(entry.path)
        facts = part.facts if part else facts_of(headers)
        alignments = (one.metadata.get("general.alignment") for one in headers)
        identity, validator, digests = self._identity(facts, part)
        return KnownModel(
            entry=entry,
            facts=facts,
            part=part,
            identity=identity,
            validator=validator,
            digests=digests,
            alignments=tuple(a if isinstance(a, int) else _DEFAULT_ALIGNMENT for a in alignments),
            sizes=tuple(header.size_bytes for header in headers),
            stamps=stamps,
        )

    def _identity(
        self, facts: ModelFacts, part: Slice | None
    ) -> tuple[Identity, str, Mapping[str, bytes]]:
        if part is not None:
            return part.identity, part.document.validator, part.document.digests
        stamps = [stamp(path) for path in facts.files]
        sizes = [one.size_bytes for one in stamps]
        validator = _validator(facts.files, stamps)
        provisional = provisional_identity(facts.header_digest, sizes, validator)
        kept = self._digests.get(facts)
        if kept is None:
            return Identity(facts.header_digest, provisional), validator, {}
        digests = {entry.name: entry.digest for entry in kept.tensors}
        return Identity(facts.header_digest, provisional, kept.root), validator, digests


def model_row(
    facts: ModelFacts,
    identity: Identity,
    name: str,
    aliases: Sequence[str],
    files: Sequence[Mapping[str, object]],
    source: str | None,
) -> dict[str, object]:
    """What a list of models says of one, ready for JSON."""
    return {
        "id": str(identity),
        "name": name,
        "aliases": list(aliases),
        "root": identity.root,
        "provisional": identity.provisional,
        "format": "gguf",
        "quantization": facts.quantization or None,
        "architecture": facts.arch,
        "parameters": facts.n_parameters,
        "layers": facts.n_layers,
        "tensors": len(facts.tensors),
        "weight_bytes": facts.weight_bytes,
        "files": list(files),
        "source": source,
    }


def files_of(model: KnownModel) -> list[dict[str, object]]:
    """Names and lengths of its files, ready for JSON."""
    return [
        {"name": shown_name(path.name), "size_bytes": size_bytes}
        for path, size_bytes in zip(model.facts.files, model.sizes, strict=True)
    ]


def _validator(paths: Sequence[Path], stamps: Sequence[FileStamp]) -> str:
    """What tells these files from others of their header: the sha256 that a cache has named them
    after, which is what their source says of them too (`pull.source.joint_validator`); else their
    dates, which are no other machine's."""
    named = [sha256_of_name(path) for path in paths]
    if all(named):
        return "\n".join(f"sha256:{digest}" for digest in named)
    dates = (f"{one.mtime_ns}-{one.inode}-{one.size_bytes}" for one in stamps)
    return f"modified:{' '.join(dates)}"


def _stamp(path: Path) -> tuple[int, int, int]:
    """Zeros for what is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_ino, found.st_size
