"""What all members hold, at one look: parts with the whole that they are of, and nothing believed
that does not fit together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from meshnode.models.facts import read_facts
from meshnode.models.identity import Identity
from meshnode.models.peers import overview as overviews
from meshnode.models.peers.directory import Listing
from meshnode.models.peers.listing import Listed
from meshnode.models.peers.overview import Lookout, Model
from meshnode.models.peers.source import Holders
from meshnode.models.pull.source import RangeSource
from meshnode.models.spans import Span
from tests.engine.synthetic import make_model
from tests.lab.holders import Circle, circle
from tests.lab.sources import FileSource
from tunnels import PeerId


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "far.gguf", layers=3, width=64, ffn=64, vocab=300, heads=2)


def lookout_of(scene: Circle) -> Lookout:
    holders = Holders(scene._sessions, scene._name)
    return Lookout(scene.directory.listings, holders.ask)


def held_by(one: Model) -> dict[str, set[str] | None]:
    """Names of the tensors of which a member has the first byte; None: all of them."""
    facts = one.facts
    assert facts is not None
    found: dict[str, set[str] | None] = {}
    for share in one.shares:
        assert share.complete or share.source is not None
        spans = () if share.source is None else share.source.holds or ()
        found[share.member] = (
            None
            if share.complete
            else {
                tensor.name
                for tensor in facts.tensors
                if any(span.start <= tensor.offset < span.stop for span in spans)
            }
        )
    return found


async def test_two_members_with_different_parts_of_what_is_not_here(
    tmp_path: Path, model: Path
) -> None:
    facts = read_facts(model)
    first = [tensor.name for tensor in facts.tensors if tensor.name.startswith("blk.0.")]
    last = [tensor.name for tensor in facts.tensors if tensor.name.startswith("blk.2.")]
    async with circle(tmp_path, "ben", "cia", "dot") as scene:
        for member, names in zip(scene.members, (first, last, []), strict=True):
            await member.holds(model, *names)
        seen = await lookout_of(scene).look([])
        (one,) = seen.elsewhere
        assert (seen.all_said, seen.here) == (True, [])
        assert held_by(one) == {"ben": set(first), "cia": set(last), "dot": set()}
        assert one.facts is not None
        assert one.facts.n_layers == 3
        assert one.files == (("far.gguf", model.stat().st_size),)


async def test_what_is_here_is_put_with_what_others_have_of_it(tmp_path: Path, model: Path) -> None:
    async with circle(tmp_path, "ben", "cia") as scene:
        ben, cia = scene.members
        part = await ben.holds(model, "output_norm.weight")
        cia.has_whole(model, digested=True)
        seen = await lookout_of(scene).look([part.identity])
        assert [share.member for share in seen.here[0].shares] == ["ben"]
        (whole,) = seen.elsewhere
        assert held_by(whole) == {"cia": None}, "of other files, as far as anybody knows"
        assert whole.root is not None
        root = Identity(b"", "0" * 64, whole.root)
        seen = await lookout_of(scene).look([root])
        assert [share.member for share in seen.here[0].shares] == ["cia"], "by the root alone"


async def test_members_are_not_asked_again_at_once(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overviews, "FRESH_S", 60.0)
    async with circle(tmp_path, "ben") as scene:
        lookout = lookout_of(scene)
        assert (await lookout.look([])).elsewhere == []
        await scene.members[0].holds(model)
        assert (await lookout.look([])).elsewhere == []
        monkeypatch.setattr(overviews, "FRESH_S", 0.0)
        assert len((await lookout.look([])).elsewhere) == 1


# -- members that say odd things --------------------------------------------------------------

PEER = PeerId(bytes(range(32)))


def listing(*models: Listed, member: str = "eve") -> Listing:
    return Listing(member, PEER, models)


async def look_at(listings: Sequence[Listing], source: RangeSource | None, *own: Identity):  # type: ignore[no-untyped-def]
    async def ask_members() -> tuple[Sequence[Listing], Sequence[str]]:
        return listings, ()

    async def ask_member(_peer: PeerId, _identity: str) -> RangeSource | None:
        return source

    return await Lookout(ask_members, ask_member).look(own)


async def test_a_header_that_does_not_fit_is_not_believed(model: Path) -> None:
    source = FileSource(model)
    lie = Listed("far", (), "a" * 64, "b" * 64, 10, 10)
    seen = await look_at([listing(lie)], source)
    assert [one.facts for one in seen.elsewhere] == [None]


async def test_who_gives_no_header_is_waited_for_no_longer_than_a_look_takes(
    model: Path, autojump_clock: trio.testing.MockClock
) -> None:
    class Slow(FileSource):
        async def read(self, *_asked: object) -> None:
            await trio.sleep_forever()

    began_s = trio.current_time()
    seen = await look_at([listing(Listed("far", (), "a" * 64, None, 10, 10))], Slow(model))
    assert trio.current_time() - began_s == overviews.LOOK_S
    assert (seen.all_said, [one.facts for one in seen.elsewhere]) == (False, [None])


async def test_so_many_models_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overviews, "MAX_ELSEWHERE", 3)
    many = [Listed(f"m{at}", (), f"{at:064x}", None, 10, 10) for at in range(9)]
    seen = await look_at([listing(*many)], None)
    assert len(seen.elsewhere) == 3


async def test_parts_are_put_with_the_whole_whoever_says_so_first() -> None:
    part = Listed("far", (), "a" * 64, None, 10, 5)
    whole = Listed("far", ("ann/far",), "a" * 64, "b" * 64, 10, 10)
    seen = await look_at([listing(part, member="a"), listing(whole, member="z")], None)
    (one,) = seen.elsewhere
    assert (one.root, sorted(share.member for share in one.shares)) == ("b" * 64, ["a", "z"])


async def test_of_large_headers_few_are_kept_and_few_are_told(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = len(read_facts(model).tensors)
    monkeypatch.setattr(overviews, "MAX_TENSORS", tensors)
    async with circle(tmp_path, "ben", "cia") as scene:
        for member, name in zip(scene.members, ("a.gguf", "b.gguf"), strict=True):
            member.has_whole(model.rename(model.with_name(name)))
            model = model.with_name(name)
        lookout = lookout_of(scene)
        first, second = (await lookout.look([])).elsewhere
        assert first.facts is not None
        assert second.facts is None
        assert len(lookout._headers) == 1


async def test_what_a_member_says_takes_so_much_memory_and_no_more(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holds = tuple(Span(0, 2 * at, 2 * at + 1) for at in range(1000))
    monkeypatch.setattr(
        overviews, "MAX_SAID_BYTES", 2 * overviews.said_bytes(FileSource(model, holds=holds))
    )
    many = [Listed(f"m{at}", (), f"{at:064x}", None, 10, 5) for at in range(9)]
    other = Listing("ben", PeerId(bytes([7]) * 32), (Listed("own", (), "c" * 64, None, 10, 5),))
    seen = await look_at([listing(*many), other], FileSource(model, holds=holds))
    said = [share.member for one in seen.elsewhere for share in one.shares if share.source]
    assert said == ["eve", "eve", "ben"], "what is too much of one takes nothing from others"
    monkeypatch.setattr(overviews, "MAX_SAID_BYTES_OF_ALL", 1)
    seen = await look_at([listing(*many)], FileSource(model, holds=holds))
    assert not any(share.source for one in seen.elsewhere for share in one.shares)
