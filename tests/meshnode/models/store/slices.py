"""A model that somebody has whole, and slices of it that others make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshnode.models.facts import ModelFacts, read_facts
from meshnode.models.manifest import Manifest, digest_model
from meshnode.models.spans import Span
from meshnode.models.store.slice import Slice, open_slice
from meshnode.models.store.store import NewFile, Store
from meshnode.models.store.writer import SliceWriter
from tests.engine.synthetic import make_model

SOURCE = "https://example.org/m.gguf"
VALIDATOR = "etag:1"


@dataclass(frozen=True)
class Whole:
    """The whole model, at its source."""

    facts: ModelFacts
    manifest: Manifest

    def header(self, index: int) -> bytes:
        stop = min(t.offset for t in self.facts.tensors if t.file_index == index)
        return self.facts.files[index].read_bytes()[:stop]

    def files(self) -> list[NewFile]:
        return [
            NewFile(path.name, path.stat().st_size, self.header(index))
            for index, path in enumerate(self.facts.files)
        ]

    def create(self, store: Store, validator: str = VALIDATOR) -> Slice:
        return store.create(self.files(), SOURCE, validator)

    def bytes_of(self, span: Span) -> bytes:
        with self.facts.files[span.file_index].open("rb") as file:
            file.seek(span.start)
            return file.read(span.stop - span.start)

    def names(self, *parts: str) -> list[str]:
        """Tensors in whose name one of these occurs."""
        return [t.name for t in self.facts.tensors if any(part in t.name for part in parts)]

    @property
    def all_names(self) -> list[str]:
        return [tensor.name for tensor in self.facts.tensors]

    @property
    def digests(self) -> dict[str, bytes]:
        return {entry.name: entry.digest for entry in self.manifest.tensors}


def make_whole(folder: Path, **changes: Any) -> Whole:
    shape: dict[str, Any] = {"layers": 3, "width": 64, "vocab": 300, "heads": 2, "ffn": 64}
    folder.mkdir(parents=True, exist_ok=True)
    facts = read_facts(make_model(folder / "m.gguf", **(shape | changes)))
    return Whole(facts, digest_model(facts))


def pull(writer: SliceWriter, whole: Whole, names: Iterable[str]) -> list[Span]:
    """All that is missing of these; what was pulled."""
    spans = writer.missing(names)
    for span in spans:
        writer.write(span.file_index, span.start, memoryview(whole.bytes_of(span)))
        writer.done(span.file_index, span.start, span.stop)
    return list(spans)


def holds_the_right_bytes(found: Slice, whole: Whole) -> bool:
    """What it says it holds is byte for byte the model's."""
    digests = found.document.digests
    for tensor in found.held:
        span = Span(tensor.file_index, tensor.offset, tensor.offset + tensor.nbytes)
        with found.facts.files[span.file_index].open("rb") as file:
            file.seek(span.start)
            if file.read(span.size_bytes) != whole.bytes_of(span):
                return False
        if digests[tensor.name] != whole.digests[tensor.name]:
            return False
    return True


def held(folder: Path) -> set[str]:
    """The names of what a slice holds."""
    return {tensor.name for tensor in open_slice(folder).held}
