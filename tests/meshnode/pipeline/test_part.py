"""Who is to hold what of a model that no node has whole, and who can fetch it from where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from meshnode.errors import BadMessage
from meshnode.events import Event, Kind
from meshnode.models.fetching import Fetcher
from meshnode.models.peers.protocol import Holding
from meshnode.models.peers.source import PeerSource
from meshnode.models.pull.source import SourceError
from meshnode.models.spans import Span
from meshnode.models.store.slice import open_slice
from meshnode.models.store.store import Store
from meshnode.models.store.thinning import annotate
from meshnode.models.store.writer import SliceWriter
from meshnode.models.web import Web, is_for_us_alone
from meshnode.pipeline import pull_order
from meshnode.pipeline.own_part import OwnPart
from meshnode.pipeline.part import Part
from tests.meshnode.models.store.slices import VALIDATOR, Whole, make_whole, pull
from tunnels import PeerId

BEN, CARL = PeerId(bytes(31) + b"b"), PeerId(bytes(31) + b"c")


@dataclass(frozen=True)
class _Session:
    peer: PeerId


def holder(whole: Whole, peer: PeerId, names: Sequence[str]) -> PeerSource:
    """A member that says it holds these."""
    spans = tuple(
        Span(tensor.file_index, tensor.offset, tensor.offset + tensor.nbytes)
        for tensor in whole.facts.tensors
        if tensor.name in names
    )
    files = tuple((file.name, file.size_bytes) for file in whole.files())
    holding = Holding(files, VALIDATOR, spans)
    return PeerSource(cast(Any, _Session(peer)), "a member", "", holding)


@dataclass
class Scene:
    whole: Whole
    store: Store
    holders: list[PeerSource]

    def part(self, **changes: Any) -> Part:
        async def find(_identity: str) -> list[PeerSource]:
            return self.holders

        found = self.whole.create(self.store)
        fetcher = Fetcher(self.store, Web().open_for_user, find)
        needed = {
            "local": self.whole.names("token_embd"),
            "ben": self.whole.names("blk.0."),
            "carl": self.whole.names("blk.1.", "blk.2.", "output"),
        }
        peers = {"ben": BEN, "carl": CARL}
        return replace(Part(found, needed, "local", fetcher, peers), **changes)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(make_whole(tmp_path / "whole"), Store(tmp_path / "models"), [])


async def test_what_each_worker_lacks_is_what_it_does_not_say_it_holds(scene: Scene) -> None:
    part = scene.part()
    everything = {"ben": part.needed["ben"], "carl": part.needed["carl"]}
    assert await part.needs_of_others() == everything
    half = scene.whole.names("blk.1.", "output")
    scene.holders = [
        holder(scene.whole, BEN, scene.whole.names("blk.0.", "blk.1.")),
        holder(scene.whole, CARL, half),
    ]
    lacking = await part.needs_of_others()
    assert lacking == {"carl": [name for name in part.needed["carl"] if name not in half]}
    scene.holders = [holder(scene.whole, BEN, scene.whole.all_names)]
    assert await part.needs_of_others() == {"carl": part.needed["carl"]}, "what ben has is ben's"


def test_a_grant_that_contradicts_itself_is_refused(scene: Scene) -> None:
    part = scene.part()
    names = sorted(part.needed["ben"])
    digests = [scene.whole.digests[name] for name in names]
    assert part.told("ben", b"".join(digests)) == dict(zip(names, digests, strict=True))
    assert part.told("ben", b"") == {}, "an older mesh says nothing"
    for odd in (b"x", b"".join(digests[1:]), b"".join(digests) + bytes(32)):
        with pytest.raises(BadMessage):
            part.told("ben", odd)
    with SliceWriter(part.slice.folder) as writer:
        pull(writer, scene.whole, names[:1])
    part = replace(part, slice=open_slice(part.slice.folder))
    assert part.told("ben", b"".join(digests))[names[0]] == digests[0]
    with pytest.raises(BadMessage, match=f"ben grants {names[0]}, and says"):
        part.told("ben", b"".join([bytes(32), *digests[1:]]))


async def test_two_workers_with_other_bytes_are_told_of_and_none_is_believed(scene: Scene) -> None:
    shared = scene.whole.names("blk.0.")
    part = scene.part(needed={"local": [], "ben": shared, "carl": shared})
    events: list[Event] = []
    own = OwnPart(part, None, events.append, lambda _: None)
    right = [scene.whole.digests[name] for name in sorted(shared)]
    own.hear("ben", "ben (aaaa)", b"".join(right))
    own.hear("carl", "carl (bbbb)", b"".join([bytes(32), bytes(32), *right[2:]]))
    await own.keep_told()
    assert events == [], "not before this machine has what it needs"
    await own.fetch()
    await own.keep_told()
    (event,) = events
    first = sorted(shared)[0]
    assert event.text.startswith(
        f"carl (bbbb) has other bytes of {first} and 1 more of m than ben (aaaa) said"
    )
    assert "mesh models verify" in event.text
    kept = open_slice(part.slice.folder).document
    assert set(kept.told) == set(sorted(shared)[2:])
    assert (kept.digests, kept.root) == ({}, None)


@pytest.mark.parametrize(
    ("document", "kind", "said"),
    [
        ({"source": "http://example.org/m.gguf"}, Kind.WARNING, "over http without TLS"),
        ({"source": "https://example.org/m.gguf"}, Kind.MODELS, "what its source gave"),
        ({"source": "mesh:m", "root": None}, Kind.MODELS, "what those say that it is"),
        ({"source": "mesh:m", "root": "5f" * 32}, Kind.MODELS, "what those say that it is"),
        ({"source": "http://example.org/m.gguf", "vouched": True}, None, ""),
        ({"source": f"mesh:{'5f' * 32}", "root": "5f" * 32}, None, ""),
    ],
)
async def test_on_whose_word_the_bytes_of_a_model_rest_is_said(
    scene: Scene, document: dict[str, Any], kind: Kind | None, said: str
) -> None:
    part = scene.part()
    annotate(part.slice.folder, lambda before: replace(before, **document))
    events: list[Event] = []
    await OwnPart(part, None, events.append, lambda _: None).tell_proof()
    assert [event.kind for event in events] == ([kind] if kind else [])
    assert all(said in event.text for event in events)


async def test_nothing_is_said_of_a_model_that_was_here_before() -> None:
    events: list[Event] = []
    await OwnPart(None, None, events.append, lambda _: None).tell_proof()
    assert events == []


def test_by_a_secret_address_workers_are_sent_to_members(scene: Scene) -> None:
    part = scene.part()
    count = len(part.slice.facts.tensors)
    plain, secret = (
        pull_order.from_wire_untrusted(replace(part, is_secret=one).order("ben"), count)
        for one in (False, True)
    )
    assert plain.reference == part.slice.document.source
    assert secret == replace(plain, reference="mesh:m")


@pytest.mark.parametrize(
    ("source", "alone"),
    [
        ("https://a/m.gguf?token=x", True),
        ("https://a/m.gguf?…", True),
        ("https://me:x@a/m.gguf", True),
        ("https://a/m.gguf", False),
        ("https://a/m.gguf?download=true", False),
        ("hf:org/repo/m.gguf", False),
        ("ollama:m", False),
        ("mesh:m", False),
        ("nonsense", False),
        (None, False),
    ],
)
def test_whose_address_it_is(source: str | None, alone: bool) -> None:
    assert is_for_us_alone(source) is alone


def test_what_is_shown_of_an_address_is_no_address(scene: Scene) -> None:
    shown = "https://a/m.gguf?…"
    for web in (Web(), Web(named="https://b/m.gguf?token=x")):
        for fetch in (web.open_for_user, web.open_for_stranger):
            with pytest.raises(SourceError, match="name the whole address again"):
                fetch(shown)
    Web(named="https://a/m.gguf?token=x").open_for_user(shown)
