"""A model, or some layers of it, onto this node's disk, from wherever its user says."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import trio

from meshnode.errors import ModelError, NetworkError
from meshnode.models.bounds import NO_BOUNDS, Bounds
from meshnode.models.fetching import FROM_MEMBERS, Fetcher, OnProgress
from meshnode.models.peers.directory import Directory
from meshnode.models.peers.listing import Choice
from meshnode.models.peers.offers import Offer, Offers
from meshnode.models.pull.reference import MeshReference, Reference, parse_reference
from meshnode.models.spans import size_of
from meshnode.models.store.slice import Slice, open_slice
from meshnode.models.store.store import Store
from meshnode.pipeline.layer_range import tensors_of_layers

log = logging.getLogger(__name__)


class Proof(Enum):
    """What stands for the bytes."""

    DIGESTS = "digests"  # each tensor's, which together make up the model's root
    SHA256 = "sha256"  # the source's, once all of it is here
    WORD = "word"  # of whoever gave them, and the link's encryption


@dataclass(frozen=True)
class Pulled:
    """What is here then. `id`: root or provisional identity."""

    name: str
    id: str
    root: str | None
    source: str | None
    path: str
    pulled_bytes: int
    held_bytes: int
    weight_bytes: int
    complete: bool
    proof: Proof

    def row(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"proof": self.proof.value}


@dataclass(frozen=True)
class Wish:
    """What a user asks for. `layers`: as written, None for all; `what` is how to call that."""

    source: str
    layers: str | None = None
    what: str = "--layers"


class Puller:
    """I pull, for this node's user or for whom its operator lets give orders."""

    def __init__(
        self,
        fetcher: Fetcher,
        store: Store,
        directory: Directory | None = None,
        offers: Offers | None = None,
    ) -> None:
        """directory: None where there are no members to ask."""
        self._fetcher = fetcher
        self._store = store
        self._directory = directory
        self._offers = offers

    async def pull(self, wish: Wish, on_progress: OnProgress, bounds: Bounds = NO_BOUNDS) -> Pulled:
        """Raises `MeshError`: the source or the members are gone, the disk is full, there is no
        such model, no such layer."""
        reference = parse_reference(wish.source)
        if isinstance(reference, MeshReference):
            return await self._pull_from_members(reference, wish, on_progress, bounds)
        return await self._pull_from_web(reference, wish, on_progress, bounds)

    async def pull_rest(
        self, part: Slice, layers: str | None, on_progress: OnProgress, *, what: str
    ) -> Pulled:
        """What a slice lacks, from members that hold it and from its source. Raises `MeshError`."""
        names = tensors_of_layers(part.facts, layers, what=what)
        await self._fetcher.fetch(part, names, {}, on_progress)
        return await self._told(part, {})

    async def _pull_from_web(
        self, reference: Reference, wish: Wish, on_progress: OnProgress, bounds: Bounds
    ) -> Pulled:
        part = await self._fetcher.obtain(str(reference), bounds)
        names = tensors_of_layers(part.facts, wish.layers, what=wish.what)
        await self._fetcher.fetch(part, names, {}, on_progress, bounds=bounds)
        return await self._told(part, {})

    async def _pull_from_members(
        self, reference: MeshReference, wish: Wish, on_progress: OnProgress, bounds: Bounds
    ) -> Pulled:
        if self._directory is None:
            raise NetworkError(f"{reference}: this node asks no members for models")
        choice = await self._directory.find(reference.name)
        whole = await trio.to_thread.run_sync(self._whole_here, choice)
        if whole is not None:
            tensors_of_layers(whole.facts, wish.layers, what=wish.what)
            return self._here_already(whole, choice)
        part = await self._begun(choice, bounds)
        names = tensors_of_layers(part.facts, wish.layers, what=wish.what)
        expected = await self._expected(reference, choice, part)
        _check_same(part, expected)
        await self._fetcher.fetch(
            part,
            names,
            expected,
            on_progress,
            root=choice.root if expected else None,
            bounds=bounds,
        )
        return await self._told(part, expected)

    # -- what it is ---------------------------------------------------------------------------

    def _whole_here(self, choice: Choice) -> Offer | None:
        """Where this node has all of it: in a folder of --models, say."""
        for identity in (choice.root, *choice.provisionals):
            offer = self._offers.find(identity) if self._offers and identity else None
            if offer and size_of(offer.spans) == sum(size for _, size in offer.files):
                if None not in (choice.root, offer.root) and choice.root != offer.root:
                    raise _others_here(choice.name)
                return offer
        return None

    async def _begun(self, choice: Choice, bounds: Bounds) -> Slice:
        """What there is of it here: its header at least."""
        for identity in (*([choice.root] if choice.root else ()), *choice.provisionals):
            part = await trio.to_thread.run_sync(self._store.by_identity, identity)
            if part is not None:
                return part
        source = f"{FROM_MEMBERS}{choice.identity}"
        for provisional in choice.provisionals:
            part = await self._fetcher.obtain_from_holders(source, provisional, bounds)
            if part is not None:
                return part
        raise NetworkError(
            f"{', '.join(choice.members[:5])} say that they have {choice.name}, and give nothing "
            "of it: their logs say why; pull again, or name a source on the web"
        )

    async def _expected(
        self, reference: MeshReference, choice: Choice, part: Slice
    ) -> Mapping[str, bytes]:
        """The digest of each tensor, where some member proves that it knows them all. That these
        files are of that root is a member's word, which is not taken for what came from elsewhere;
        it is the user's where the root itself was named."""
        is_named = choice.root is not None and reference.name.casefold() == choice.root
        is_theirs = (part.document.source or "").startswith(FROM_MEMBERS)
        if choice.root is None or not (is_named or is_theirs):
            return {}
        assert self._directory is not None
        found = await self._directory.digests(choice.root, part.facts)
        if found is not None:
            return found
        if is_named:
            raise NetworkError(
                f"no member that is connected proves that it has {reference}: what they give as "
                "its digests does not make up that identity"
            )
        log.warning("nobody proves that %s is %s", choice.name, choice.root)
        return {}

    # -- what to tell -------------------------------------------------------------------------

    async def _told(self, before: Slice, expected: Mapping[str, bytes]) -> Pulled:
        part = await trio.to_thread.run_sync(open_slice, before.folder)
        if self._offers is not None:
            self._offers.look_again()
        proof = Proof.WORD
        if expected:
            proof = Proof.DIGESTS
        elif part.document.vouched:
            proof = Proof.SHA256
        return Pulled(
            name=part.name,
            id=str(part.identity),
            root=part.identity.root,
            source=part.document.source,
            path=str(part.facts.path),
            pulled_bytes=max(0, part.held_bytes - before.held_bytes),
            held_bytes=part.held_bytes,
            weight_bytes=part.facts.weight_bytes,
            complete=part.complete,
            proof=proof,
        )

    def _here_already(self, whole: Offer, choice: Choice) -> Pulled:
        weight_bytes = whole.facts.weight_bytes
        return Pulled(
            name=choice.name,
            id=choice.identity,
            root=whole.root,
            source=None,
            path=str(whole.facts.path),
            pulled_bytes=0,
            held_bytes=weight_bytes,
            weight_bytes=weight_bytes,
            complete=True,
            proof=Proof.DIGESTS if whole.root else Proof.WORD,
        )


def _check_same(part: Slice, expected: Mapping[str, bytes]) -> None:
    """What is held is what these digests are of: nothing is thrown away at a member's word. Raises
    `ModelError`."""
    known = part.document.digests
    if any(known[name] != expected.get(name, known[name]) for name in part.document.held):
        raise _others_here(part.folder.name)


def _others_here(name: str) -> ModelError:
    return ModelError(
        f"what is here of {name} is not what members say that it is: one of the two is wrong; "
        f"remove yours (`mesh models rm {name}`) and pull again, or keep it"
    )
