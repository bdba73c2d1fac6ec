"""A node fetches what it needs of a model, and no more, and no twice."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio
import trio.testing

from meshnode.errors import MeshError, ModelError
from meshnode.models import fetching
from meshnode.models.facts import read_facts
from meshnode.models.fetching import Fetcher
from meshnode.models.manifest import Manifest, digest_model
from meshnode.models.pull.pull import Pull, Supply
from meshnode.models.pull.remote_header import FIRST_STEP_BYTES
from meshnode.models.pull.source import RangeSource, SourceChanged, SourceFault
from meshnode.models.spans import Span
from meshnode.models.store.slice import Slice, in_use, open_slice
from meshnode.models.store.store import Store
from meshnode.models.store.thinning import annotate
from meshnode.models.store.writer import SliceWriter
from tests.engine.synthetic import make_model
from tests.lab.sources import FileSource

REFERENCE = "https://example.org/small.gguf"
FEW = ("blk.1.attn_q.weight", "blk.1.attn_k.weight", "output_norm.weight")


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    path = tmp_path / "served" / "small.gguf"
    path.parent.mkdir()
    return FileSource(make_model(path, layers=4, width=512, ffn=1024))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


@pytest.fixture
def fetcher(store: Store, source: FileSource) -> Fetcher:
    return Fetcher(store, source.open)


async def fetch(fetcher: Fetcher, part: Slice, *names: str) -> Manifest:
    return await fetcher.fetch(part, names, {}, lambda _done, _total: None)


async def test_a_model_begins_as_its_header(
    fetcher: Fetcher, source: FileSource, store: Store
) -> None:
    part = await fetcher.obtain(REFERENCE)
    assert part.facts.tensors == read_facts(source.path).tensors
    assert (part.held, part.document.source) == ((), REFERENCE)
    assert source.asked_bytes <= FIRST_STEP_BYTES
    assert (await fetcher.obtain(REFERENCE)).folder == part.folder
    assert [found.folder for found in store.slices()] == [part.folder]


async def test_what_is_asked_for_comes_once_and_nothing_else(
    fetcher: Fetcher, source: FileSource
) -> None:
    part = await fetcher.obtain(REFERENCE)
    source.asked.clear()
    told: list[tuple[int, int]] = []
    manifest = await fetcher.fetch(part, FEW, {}, lambda done, total: told.append((done, total)))
    digests = {
        tensor.name: tensor.digest for tensor in digest_model(read_facts(source.path)).tensors
    }
    assert {tensor.name: tensor.digest for tensor in manifest.tensors} == {
        name: digests[name] for name in FEW
    }
    assert told[-1] == (source.asked_bytes, source.asked_bytes)
    source.asked.clear()
    source.is_there = False
    assert (await fetch(fetcher, part, *FEW)).tensors == manifest.tensors
    assert source.asked == [], "nobody is asked for what is here"


async def test_two_who_want_the_same_at_once_get_it_once(
    fetcher: Fetcher, source: FileSource, store: Store
) -> None:
    """A node's own user, and an orchestrator that it lends to."""
    lender = fetcher.under_other_rules(source.open)
    begun: list[Slice] = []
    manifests: list[Manifest] = []

    async def want(who: Fetcher) -> None:
        begun.append(await who.obtain(REFERENCE))
        manifests.append(await fetch(who, begun[-1], *FEW))

    async with trio.open_nursery() as nursery:
        for who in (fetcher, lender, lender):
            nursery.start_soon(want, who)
    assert len({part.folder for part in begun}) == 1
    assert [found.folder for found in store.slices()] == [begun[0].folder]
    assert len({manifest.tensors for manifest in manifests}) == 1
    weights = [span for span in source.asked if span.start > 0]
    assert len(weights) == len(set(weights)), "no range was asked for twice"


@dataclass
class GatedSource(FileSource):
    """Gives the header at once, and weights when it may."""

    asked_for_weights: trio.Event = field(default_factory=trio.Event)
    gate: trio.Event = field(default_factory=trio.Event)

    async def read(
        self, file_index: int, start: int, stop: int, into: Callable[[memoryview], None]
    ) -> None:
        if start:
            self.asked_for_weights.set()
            await self.gate.wait()
        await super().read(file_index, start, stop, into)


async def test_who_waits_for_another_is_told_that_it_goes_on(
    source: FileSource, store: Store
) -> None:
    slow = GatedSource(source.path)
    fetcher = Fetcher(store, slow.open)
    part = await fetcher.obtain(REFERENCE)
    first: list[tuple[int, int]] = []
    waiting: list[tuple[int, int]] = []

    async def fetch_telling(names: tuple[str, ...], told: list[tuple[int, int]]) -> None:
        await fetcher.fetch(part, names, {}, lambda done, total: told.append((done, total)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch_telling, FEW, first)
        await slow.asked_for_weights.wait()
        nursery.start_soon(fetch_telling, ("blk.2.attn_q.weight",), waiting)
        await trio.testing.wait_all_tasks_blocked()
        slow.gate.set()
    assert first
    assert waiting[: len(first)] == first
    assert waiting[-1][0] == waiting[-1][1] != first[-1][0]


async def test_without_its_source_a_model_is_what_there_is_of_it(
    fetcher: Fetcher, source: FileSource
) -> None:
    source.is_there = False
    with pytest.raises(SourceFault):
        await fetcher.obtain(REFERENCE)
    source.is_there = True
    part = await fetcher.obtain(REFERENCE)
    source.is_there = False
    assert (await fetcher.obtain(REFERENCE)).folder == part.folder
    with pytest.raises(SourceFault):
        await fetch(fetcher, part, *FEW)


async def test_a_file_that_was_replaced_at_its_source_is_another_model(
    fetcher: Fetcher, source: FileSource
) -> None:
    part = await fetcher.obtain(REFERENCE)
    source.version = "etag:2"
    with pytest.raises(SourceChanged, match="mesh models rm"):
        await fetch(fetcher, part, *FEW)
    other = await fetcher.obtain(REFERENCE)
    assert other.identity.provisional != part.identity.provisional
    assert len((await fetch(fetcher, other, *FEW)).tensors) == len(FEW)


async def test_a_source_that_is_looked_at_tells_of_another_file_and_of_nothing_else(
    fetcher: Fetcher, source: FileSource
) -> None:
    part = await fetcher.obtain(REFERENCE)
    source.asked.clear()
    await fetcher.check_source(part)
    source.version, source.is_there = "etag:2", False
    await fetcher.check_source(part)
    source.is_there = True
    with pytest.raises(SourceChanged, match="mesh models rm"):
        await fetcher.check_source(part)
    assert source.asked == [], "a look takes no bytes"


@pytest.mark.parametrize("kept", ["mesh:small", None])
async def test_where_no_server_is_the_source_none_is_looked_at(
    fetcher: Fetcher, store: Store, kept: str | None
) -> None:
    part = await fetcher.obtain(REFERENCE)
    annotate(part.folder, lambda document: replace(document, source=kept))
    opened: list[str] = []

    def open_source(reference: str) -> AbstractAsyncContextManager[RangeSource]:
        opened.append(reference)
        raise SourceFault("nobody answers")

    await Fetcher(store, open_source).check_source(open_slice(part.folder))
    assert opened == []


async def test_bytes_with_another_digest_than_somebody_knows_are_never_held(
    fetcher: Fetcher, source: FileSource
) -> None:
    part = await fetcher.obtain(REFERENCE)
    source.spoil = lambda data: bytes([data[0] ^ 1]) + data[1:]
    digests = {
        tensor.name: tensor.digest for tensor in digest_model(read_facts(source.path)).tensors
    }
    expected = {name: digests[name] for name in FEW}
    with pytest.raises(MeshError):
        await fetcher.fetch(part, FEW, expected, lambda _done, _total: None)
    source.spoil = bytes
    manifest = await fetcher.fetch(part, FEW, expected, lambda _done, _total: None)
    assert {tensor.name for tensor in manifest.tensors} == set(FEW)


async def test_what_a_kill_left_unclear_is_read_again_and_told_and_can_be_given_up(
    fetcher: Fetcher, source: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PROGRESS_STEP_BYTES", 1)
    part = await fetcher.obtain(REFERENCE)
    await fetch(fetcher, part, *FEW)
    os.utime(part.facts.path, ns=(1, 1))  # as after a kill: the times are not those told of
    with trio.CancelScope() as scope:

        def give_up(*_: int) -> None:
            scope.cancel()

        await fetcher.fetch(part, FEW, {}, give_up)
    assert scope.cancelled_caught
    told: list[tuple[int, int]] = []
    source.asked.clear()
    await fetcher.fetch(part, FEW, {}, lambda done, total: told.append((done, total)))
    held_bytes = sum(tensor.nbytes for tensor in part.facts.tensors if tensor.name in FEW)
    assert [total for _, total in told] == [held_bytes] * len(FEW)
    assert source.asked == []


@pytest.mark.parametrize("is_right", [True, False])
async def test_a_whole_model_is_held_against_what_its_source_says(
    fetcher: Fetcher, source: FileSource, is_right: bool
) -> None:
    digest = hashlib.sha256(source.path.read_bytes() + (b"" if is_right else b"!")).hexdigest()
    source.version = f"sha256:{digest}"
    part = await fetcher.obtain(REFERENCE)
    names = [tensor.name for tensor in part.facts.tensors]
    await fetch(fetcher, part, *names[1:])
    if is_right:
        assert len((await fetch(fetcher, part, *names)).tensors) == len(names)
        return
    for _ in range(2):
        with pytest.raises(ModelError, match="not what its source says"):
            await fetch(fetcher, part, *names)
        left = await fetcher.obtain(REFERENCE)
        assert (left.held, left.identity.root, left.document.digests) == ((), None, {})


async def test_what_is_not_as_its_source_says_and_in_use_is_not_said_to_be_thrown_away(
    fetcher: Fetcher, source: FileSource
) -> None:
    source.version = f"sha256:{'0' * 64}"
    part = await fetcher.obtain(REFERENCE)
    names = [tensor.name for tensor in part.facts.tensors]
    await fetch(fetcher, part, *names[1:])
    with in_use(part.facts.files):
        with pytest.raises(ModelError, match="still here, as something reads it") as caught:
            await fetch(fetcher, part, *names)
        assert "thrown away" not in str(caught.value)
        assert (await fetcher.obtain(REFERENCE)).complete
    with pytest.raises(ModelError, match="thrown away"):
        await fetch(fetcher, part, *names)
    assert (await fetcher.obtain(REFERENCE)).held == ()


async def test_a_model_that_a_kill_left_whole_and_unchecked_is_checked_at_the_next_start(
    fetcher: Fetcher, source: FileSource
) -> None:
    source.version = f"sha256:{'0' * 64}"
    part = await fetcher.obtain(REFERENCE)
    names = [tensor.name for tensor in part.facts.tensors]
    with SliceWriter(part.folder) as writer:
        await Pull(writer.missing(names), [Supply(source)], writer).run()
    assert (await fetcher.obtain(REFERENCE)).complete
    with pytest.raises(ModelError, match="not what its source says"):
        await fetch(fetcher, part, *names)


async def test_what_its_source_says_is_compared_once(
    fetcher: Fetcher, source: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.version = f"sha256:{hashlib.sha256(source.path.read_bytes()).hexdigest()}"
    part = await fetcher.obtain(REFERENCE)
    names = [tensor.name for tensor in part.facts.tensors]
    await fetch(fetcher, part, *names)
    assert (await fetcher.obtain(REFERENCE)).document.vouched
    monkeypatch.delattr(hashlib, "sha256")
    await fetch(fetcher, part, *names)


async def test_what_came_from_nowhere_cannot_be_completed(
    fetcher: Fetcher, source: FileSource, store: Store
) -> None:
    part = await fetcher.obtain(REFERENCE)
    header = (part.folder / "small.gguf").read_bytes()
    from meshnode.models.store.store import NewFile

    size_bytes = source.path.stat().st_size
    made = store.create([NewFile("other.gguf", size_bytes, header)], None, "etag:1")
    with pytest.raises(MeshError, match="where the rest is"):
        await fetch(fetcher, made, *FEW)


async def test_what_members_gave_of_a_file_is_not_fetched_again_from_its_source(
    fetcher: Fetcher, source: FileSource, store: Store
) -> None:
    member = replace(source, holds=(Span(0, 0, source.path.stat().st_size),), asked=[])

    async def find(_identity: str) -> list[FileSource]:
        return [member]

    begun, _ = await fetcher._begin("mesh:small", source)
    await fetch(Fetcher(store, source.open, find), begun, FEW[0])
    source.asked.clear()
    part = await fetcher.obtain(REFERENCE)
    assert (part.folder, part.document.source) == (begun.folder, REFERENCE)
    assert [found.folder for found in store.slices()] == [begun.folder]
    await fetch(fetcher, part, *FEW)
    held = {tensor.name for tensor in open_slice(part.folder).held}
    assert held == set(FEW)
    place = next(one for one in part.facts.tensors if one.name == FEW[0])
    assert not any(one.start < place.offset + 1 < one.stop for one in source.asked[1:])


async def test_who_says_it_has_more_pieces_than_there_are_is_asked_for_none(
    source: FileSource, store: Store
) -> None:
    async def find(_identity: str) -> list[FileSource]:
        return [liar]

    fetcher = Fetcher(store, source.open, find)
    liar = replace(source, asked=[])
    part = await fetcher.obtain(REFERENCE)
    liar.holds = tuple(Span(0, 2 * at, 2 * at + 1) for at in range(len(part.facts.tensors) + 2))
    assert await fetcher.holders_of(part) == []
    assert {tensor.name for tensor in (await fetch(fetcher, part, *FEW)).tensors} == set(FEW)
    assert liar.asked == []


async def test_a_root_that_members_named_is_not_held_against_a_source(
    fetcher: Fetcher, source: FileSource
) -> None:
    begun, _ = await fetcher._begin("mesh:small", source)
    annotate(begun.folder, lambda document: replace(document, root="ab" * 32))
    part = await fetcher.obtain(REFERENCE)
    assert part.folder != begun.folder
    assert part.identity.root is None


async def test_what_a_neighbour_has_is_not_asked_of_members_far_away(
    store: Store, source: FileSource
) -> None:
    everything = tuple(Span(number, 0, file.size_bytes) for number, file in enumerate(source.files))
    far, unmeasured, near = (
        FileSource(source.path, source.version, title, everything, rtt_s=rtt_s)
        for title, rtt_s in (("far", 0.09), ("unmeasured", None), ("near", 0.001))
    )

    async def find(_identity: str) -> list[FileSource]:
        return [far, unmeasured, near]

    fetcher = Fetcher(store, source.open, find)
    part = await fetcher.obtain(REFERENCE)
    await fetch(fetcher, part, *FEW)
    assert near.asked
    assert not far.asked
    assert not unmeasured.asked
