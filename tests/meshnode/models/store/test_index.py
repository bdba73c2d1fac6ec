"""Which slices are of an identity, found without reading those that have not changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode import state
from meshnode.models.peers.offers import Offers, held_spans
from meshnode.models.store import slice as slices
from meshnode.models.store.slice import open_slice
from meshnode.models.store.store import Store
from meshnode.models.store.writer import SliceWriter
from tests.meshnode.models.store.slices import make_whole, pull


def test_a_question_for_what_is_not_here_reads_no_slice_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, store = make_whole(tmp_path / "source"), Store(tmp_path / "models")
    parts = [
        store.create(whole.files(), f"https://example.org/{at}", f"etag:{at}") for at in range(5)
    ]
    offers = Offers(store)
    read: list[Path] = []

    def read_file(path: Path) -> bytes:
        read.append(path)
        return state.read_file(path)

    monkeypatch.setattr(slices, "read_file", read_file)
    for _ in range(3):
        assert offers.find("0" * 64) is None
    assert len(read) == len(parts)
    for part in parts:
        found = offers.find(part.identity.provisional)
        assert found is not None
        assert found.paths == part.facts.files
    read.clear()
    store.remove(parts[0].folder)
    with SliceWriter(parts[1].folder) as writer:
        pull(writer, whole, whole.names("blk.0."))
    read.clear()
    assert offers.find(parts[0].identity.provisional) is None
    assert {path.parent for path in read} <= {parts[1].folder}, "what has changed alone"
    again = offers.find(parts[1].identity.provisional)
    assert again is not None
    assert again.spans == held_spans(open_slice(parts[1].folder))
