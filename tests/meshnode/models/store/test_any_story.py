"""Whatever happens to a slice, in whatever order: what it says it holds is the model's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from meshnode.models.spans import Span, size_of
from meshnode.models.store import writer as writer_module
from meshnode.models.store.slice import held_manifest, open_slice
from meshnode.models.store.store import Store
from meshnode.models.store.writer import SliceWriter
from tests.meshnode.models.store.slices import Whole, holds_the_right_bytes, make_whole, pull

STORIES = 25
STEPS = 25


class Story:
    """One slice, one die. `done`: bytes that were told to be whole and were never taken back."""

    def __init__(self, folder: Path, whole: Whole, seed: int) -> None:
        self.folder = folder
        self.whole = whole
        self.dice = random.Random(seed)
        self.held: set[str] = set()
        self.writer = self._open()

    def _open(self) -> SliceWriter:
        knows = self.dice.random() < 0.5
        return SliceWriter(self.folder, self.whole.digests if knows else None)

    def _some(self) -> list[str]:
        names = self.whole.all_names
        return self.dice.sample(names, self.dice.randint(1, 6))

    def pull_some(self) -> None:
        for span in self.writer.missing(self._some()):
            start = self.dice.randint(span.start, span.stop - 1)
            stop = self.dice.randint(start + 1, span.stop)
            piece = Span(span.file_index, start, stop)
            self.writer.write(piece.file_index, start, memoryview(self.whole.bytes_of(piece)))
            assert self.writer.done(piece.file_index, start, stop) == ()

    def pull_whole_ones(self) -> None:
        pull(self.writer, self.whole, self._some())

    def write_without_end(self) -> None:
        """A connection dies with some of a piece written, or with noise: it was never done."""
        for span in self.writer.missing(self._some()):
            noise = self.dice.randbytes(min(span.size_bytes, 5000))
            self.writer.write(span.file_index, span.start, memoryview(noise))

    def overwrite_neighbours(self) -> None:
        """A piece that spans what is held, with other bytes there: a source that lies."""
        size_bytes = self.writer.slice.document.files[0][1]
        start = self.dice.randrange(size_bytes)
        noise = self.dice.randbytes(min(size_bytes - start, 20_000))
        self.writer.write(0, start, memoryview(noise))

    def lie(self) -> None:
        """Wrong bytes for a tensor whose digest is known: thrown away."""
        known = self.writer._expected or self.writer._digests
        names = [name for name in self._some() if name in known]
        missing = self.writer.missing(names)
        for span in missing:
            noise = self.dice.randbytes(span.size_bytes)
            self.writer.write(span.file_index, span.start, memoryview(noise))
            self.writer.done(span.file_index, span.start, span.stop)
        if missing:
            assert self.writer.missing(names)

    def save(self) -> None:
        self.held = {tensor.name for tensor in self.writer.save().held}

    def drop(self) -> None:
        names = self._some()
        self.writer.drop(names)
        self.held -= set(names)

    def crash(self) -> None:
        """All that a kill takes is what this process had in mind."""
        self.writer._let_go()
        self._look()
        self.writer = self._open()

    def close(self) -> None:
        self.writer.close()
        self._look()
        self.writer = self._open()
        assert self.writer.lost == ()

    def _look(self) -> None:
        found = open_slice(self.folder)
        assert holds_the_right_bytes(found, self.whole)
        held = {entry.name for entry in held_manifest(found).tensors}
        assert self.held <= held, "what was told to be held is"

    def end(self) -> None:
        left = size_of(self.writer.missing(self.whole.all_names))
        assert left <= self.whole.facts.weight_bytes
        pull(self.writer, self.whole, self.whole.all_names)
        self.writer.close()
        found = open_slice(self.folder)
        assert found.complete
        assert found.identity.root == self.whole.manifest.root
        assert holds_the_right_bytes(found, self.whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("source")
    return make_whole(folder, layers=2, width=32, vocab=260, heads=1, ffn=64, shards=2)


def test_whatever_happens_a_slice_holds_what_it_says(
    tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "SAVE_EVERY_BYTES", 3000)
    for seed in range(STORIES):
        made = whole.create(Store(tmp_path / "models"), f"etag:{seed}")
        story = Story(made.folder, whole, seed)
        steps = (
            *(story.pull_some, story.pull_some, story.pull_whole_ones, story.write_without_end),
            *(story.overwrite_neighbours, story.lie, story.save, story.drop),
            *(story.crash, story.close),
        )
        try:
            for _ in range(STEPS):
                story.dice.choice(steps)()
            story.end()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
