"""A model that no node has whole: what this one, the orchestrator, holds, and others are to hold.

Each node of a deployment fetches what the plan gives it to compute with, all at the same time. What
nobody has digested is known by the model's provisional identity: the header, the files' lengths and
what the source says of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from meshnode.errors import BadMessage
from meshnode.models.facts import ModelFacts
from meshnode.models.fetching import Fetcher
from meshnode.models.manifest import Manifest, WantedModel, WantedTensor
from meshnode.models.needs import kind_of, needed_tensors
from meshnode.models.peers.source import PeerSource
from meshnode.models.pull.reference import MeshReference
from meshnode.models.store.slice import Slice, slice_of
from meshnode.models.store.thinning import note_needed
from meshnode.models.web import is_for_us_alone
from meshnode.pipeline import pull_order
from meshnode.pipeline.plan import Plan
from meshnode.pipeline.pull_order import PullOrder, unpack_digests_untrusted
from meshnode.pipeline.stock import Cover
from meshnode.pipeline.survey import LOCAL_NAME, Lender
from tunnels import PeerId

SOURCE_LOOK_S = 10.0
"""For a source to say which file it has. Meanwhile no worker is asked again."""


@dataclass(frozen=True)
class Part:
    """`needed`: by node of the plan, the names of what it computes with. `peers`: who those nodes
    are that lend. `is_secret`: the source is for this node alone, as somebody named it."""

    slice: Slice
    needed: Mapping[str, Sequence[str]]
    local: str
    fetcher: Fetcher
    peers: Mapping[str, PeerId] = field(default_factory=dict)
    is_secret: bool = False

    @property
    def root(self) -> str:
        """The same on every node from the first start on, whoever learns the digests when."""
        return self.slice.identity.provisional

    @property
    def wanted(self) -> WantedModel:
        """Every tensor, with its digest where this node has it."""
        digests = self.slice.document.digests
        tensors = sorted(self.slice.facts.tensors, key=lambda tensor: tensor.name)
        return WantedModel(
            self.root,
            tuple(
                WantedTensor(one.name, one.type, one.ne, one.nbytes, digests.get(one.name))
                for one in tensors
            ),
        )

    def order(self, node: str) -> bytes:
        """What a lender is to have, b"" where nothing says from where. By a secret address it could
        fetch nothing: it is to take all of it from members, this one at least."""
        source = self.slice.document.source
        if self.is_secret:
            source = str(MeshReference(self.slice.name))
        if source is None:
            return b""
        positions = {tensor.name: at for at, tensor in enumerate(self.wanted.tensors)}
        needed = tuple(sorted(positions[name] for name in self.needed[node]))
        return pull_order.to_wire(PullOrder(source, self.root, needed))

    async def fetch(
        self, on_progress: Callable[[int, int], None], further: Sequence[str] = ()
    ) -> Manifest:
        """This node's own part, and what it holds then. Raises `MeshError`."""
        names = (*self.needed[self.local], *further)
        manifest = await self.fetcher.fetch(self.slice, names, {}, on_progress)
        await trio.to_thread.run_sync(note_needed, [self.slice.facts.path], names)
        return manifest

    def told(self, node: str, digests: bytes) -> dict[str, bytes]:
        """What a lender's grant says of the tensors that it was to have: nothing, or all of them.
        Raises `BadMessage`, also where it is not what it was asked to have."""
        names = sorted(self.needed[node])
        found = dict(zip(names, unpack_digests_untrusted(digests, len(names)), strict=False))
        known = self.slice.document.digests
        for name, digest in found.items():
            if known.get(name, digest) != digest:
                raise BadMessage(f"{node} grants {name}, and says that it has other bytes of it")
        return found

    async def needs_of_others(self) -> dict[str, list[str]]:
        """By lender, what it is to compute with and does not hold, as far as it says."""
        holders = await self.fetcher.holders_of(self.slice)
        held = {one.peer: one.holds or () for one in holders if isinstance(one, PeerSource)}
        places = {one.name: one for one in self.slice.facts.tensors}
        needs: dict[str, list[str]] = {}
        for node, peer in self.peers.items():
            there = Cover(held.get(peer, ()))
            lacking = [name for name in self.needed[node] if not there.covers(places[name])]
            if lacking:
                needs[node] = lacking
        return needs

    async def check_source(self) -> None:
        """Asks the source whether it still has the file that lenders are to fetch from there. What
        a lender says of it is not believed: it could end a deployment with a lie. Where it does not
        answer soon, nothing is said. Raises `SourceChanged`."""
        if self.is_secret or not await self.needs_of_others():
            return
        with trio.move_on_after(SOURCE_LOOK_S):
            await self.fetcher.check_source(self.slice)

    def lacking(self, tensor: str, manifest: Manifest) -> tuple[str, ...]:
        """What to fetch where the engine misses this tensor: it and its like in other layers, which
        it would miss next. A device that cannot compute with a tensor as it is stored leaves it to
        this machine, and that shows only in the load. () where fetching cannot help."""
        tensors = {one.name: one for one in self.slice.facts.tensors}
        held = {one.name for one in manifest.tensors}
        if tensor in held or tensor not in tensors:
            return ()
        told = tensors[tensor]
        owners = [set(names) for names in self.needed.values() if tensor in names]
        among = set().union(*owners) if owners else set(tensors)
        return tuple(
            one.name
            for one in self.slice.facts.tensors
            if one.name in among
            and one.name not in held
            and (kind_of(one.name), one.type) == (kind_of(tensor), told.type)
        )

    def held(self, manifest: Manifest) -> dict[Path, list[str]]:
        """By file, what of it is no hole."""
        files = [Path(file.path) for file in manifest.files]
        held: dict[Path, list[str]] = {path: [] for path in files}
        for tensor in manifest.tensors:
            held[files[tensor.file_index]].append(tensor.name)
        return held


def part_of(
    facts: ModelFacts, plan: Plan, lenders: Sequence[Lender], fetcher: Fetcher, named: str | None
) -> Part | None:
    """Who is to hold what, where this machine's file is a slice. `named`: the source, as its user
    wrote it. Blocks for the header."""
    found = slice_of(facts.path)
    if found is None:
        return None
    needed = dict(needed_tensors(facts, plan.shares))
    own = {*needed[LOCAL_NAME]}
    for lender in lenders:
        if lender.session is None:  # a bare rpc-server holds nothing: it is sent all
            own.update(needed[lender.name])
    needed[LOCAL_NAME] = tuple(sorted(own))
    peers = {one.name: one.session.peer for one in lenders if one.session}
    is_secret = is_for_us_alone(named or found.document.source)
    return Part(found, needed, LOCAL_NAME, fetcher, peers, is_secret)
