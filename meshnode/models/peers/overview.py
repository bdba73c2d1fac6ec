"""What the members that are connected hold, for whoever looks at all of the mesh at once.

Each says which models it has; of a part it is asked which bytes, and of a model that is not on this
node somebody is asked for the header. All of it is the members' word, but that a header and a
provisional identity belong together.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import trio

from meshnode.errors import MeshError
from meshnode.models.facts import ModelFacts, facts_of
from meshnode.models.identity import Identity, provisional_identity
from meshnode.models.packed_spans import SPAN_BYTES
from meshnode.models.peers.directory import Listing
from meshnode.models.peers.listing import Listed
from meshnode.models.pull.remote_header import fetch_headers
from meshnode.models.pull.source import RangeSource
from tunnels import PeerId

LOOK_S = 10.0
FRESH_S = 2.0
"""How old an answer may be: who asks again and again shall not have the members asked each time."""
MAX_QUESTIONS = 8
MAX_ELSEWHERE = 128
"""Models that are told of without being here."""
MAX_TENSORS = 100_000
"""Of all models that are told of without being here, and of those whose headers are kept."""
MAX_SAID_BYTES = 2 << 20
MAX_SAID_BYTES_OF_ALL = 32 << 20
"""Of memory, for what one member, and all of them, say of parts. What is more is not kept."""
_FILE_BYTES = 400

AskMembers = Callable[[], Awaitable[tuple[Sequence[Listing], Sequence[str]]]]
"""What each member has, and who did not say."""
AskMember = Callable[[PeerId, str], Awaitable[RangeSource | None]]
"""What a member holds of the model of that identity."""

log = logging.getLogger(__name__)


@dataclass
class Share:
    """What a member has of a model. `source`: of a part, which bytes; None: it did not say."""

    member: str
    peer: PeerId
    provisional: str
    held_bytes: int
    complete: bool
    source: RangeSource | None = None


@dataclass
class Model:
    """A model, and which members have something of it. `facts`, `files` (names and lengths): of
    one that is not here, None where nobody gave a header that fits."""

    names: tuple[str, ...]
    provisional: str
    root: str | None
    shares: list[Share] = field(default_factory=list)
    facts: ModelFacts | None = None
    files: tuple[tuple[str, int], ...] = ()

    def is_of(self, listed: Listed) -> bool:
        same_root = self.root is not None and self.root == listed.root
        return same_root or self.provisional == listed.provisional


@dataclass
class Overview:
    """`here`: of the models on this node, in the order that was asked for. `all_said`: every member
    that is connected said what it has."""

    here: list[Model]
    elsewhere: list[Model]
    all_said: bool


class Lookout:
    """I look at what all members hold."""

    def __init__(self, ask_members: AskMembers, ask_member: AskMember) -> None:
        self._ask_members = ask_members
        self._ask_member = ask_member
        self._one_at_a_time = trio.Lock()
        self._listings: tuple[Sequence[Listing], Sequence[str]] = (), ()
        self._looked_at = -1e9
        self._headers: OrderedDict[str, tuple[ModelFacts, tuple[tuple[str, int], ...]]]
        self._headers = OrderedDict()
        self._sources: dict[tuple[PeerId, str], RangeSource | None] = {}
        self._said_bytes: Counter[PeerId] = Counter()

    async def look(self, own: Iterable[Identity]) -> Overview:
        """own: of the models that are here. Nobody is waited for long; what was not said in time is
        missing."""
        here = [Model((), one.provisional, one.root) for one in own]
        async with self._one_at_a_time:
            overview = Overview(here, [], all_said=False)
            with trio.move_on_after(LOOK_S):
                await self._look(overview)
            return overview

    async def _look(self, overview: Overview) -> None:
        if trio.current_time() - self._looked_at >= FRESH_S:
            self._listings = await self._ask_members()
            self._sources.clear()
            self._said_bytes.clear()
            self._looked_at = trio.current_time()
        listings, silent = self._listings
        _sort(listings, overview)
        limit = trio.CapacityLimiter(MAX_QUESTIONS)
        async with trio.open_nursery() as nursery:
            for model in (*overview.here, *overview.elsewhere):
                for share in model.shares:
                    if not share.complete:
                        nursery.start_soon(self._ask_what, share, limit)
        left = MAX_TENSORS
        for model in overview.elsewhere:
            await self._find_facts(model)
            left -= len(model.facts.tensors) if model.facts else 0
            if left < 0:
                model.facts = None
                break
        overview.all_said = not silent

    async def _ask_what(self, share: Share, limit: trio.CapacityLimiter) -> None:
        async with limit:
            share.source = await self._source(share)

    async def _source(self, share: Share) -> RangeSource | None:
        asked = share.peer, share.provisional
        if asked not in self._sources:
            source = await self._ask_member(*asked)
            self._sources[asked] = source if source and self._has_room(share, source) else None
        return self._sources[asked]

    def _has_room(self, share: Share, source: RangeSource) -> bool:
        size_bytes = said_bytes(source)
        if self._said_bytes[share.peer] + size_bytes > MAX_SAID_BYTES:
            log.warning("%s says more of parts of models than is kept", share.member)
            return False
        if self._said_bytes.total() + size_bytes > MAX_SAID_BYTES_OF_ALL:
            log.warning("the members say more of parts of models than is kept")
            return False
        self._said_bytes[share.peer] += size_bytes
        return True

    async def _find_facts(self, model: Model) -> None:
        for share in model.shares:
            if share.provisional not in self._headers:
                source = await self._source(share)
                found = await _header(source, share.provisional) if source else None
                if found is None:
                    continue
                self._keep(share.provisional, *found)
            model.facts, model.files = self._headers[share.provisional]
            self._headers.move_to_end(share.provisional)
            return

    def _keep(
        self, provisional: str, facts: ModelFacts, files: tuple[tuple[str, int], ...]
    ) -> None:
        self._headers[provisional] = facts, files
        kept = sum(len(one.tensors) for one, _ in self._headers.values())
        while kept > MAX_TENSORS and len(self._headers) > 1:
            kept -= len(self._headers.popitem(last=False)[1][0].tensors)


def _sort(listings: Sequence[Listing], overview: Overview) -> None:
    """Puts what members have with the models that it is of. Whoever knows a root comes first, so
    that parts, which know none, are put with the whole that they are parts of."""
    told = [(one, listing) for listing in listings for one in listing.models]
    models = overview.here
    for one, listing in sorted(told, key=lambda pair: pair[0].root is None):
        share = Share(
            listing.member,
            listing.peer,
            one.provisional,
            one.held_bytes,
            complete=one.held_bytes >= one.weight_bytes,
        )
        fitting = [model for model in (*models, *overview.elsewhere) if model.is_of(one)]
        for model in fitting:
            model.shares.append(share)
        if not fitting and len(overview.elsewhere) < MAX_ELSEWHERE:
            names = (one.name, *one.further_names)
            overview.elsewhere.append(Model(names, one.provisional, one.root, [share]))


def said_bytes(source: RangeSource) -> int:
    """About as much memory as a member's word on a model takes."""
    files = sum(_FILE_BYTES + 4 * len(file.name) for file in source.files)
    return files + 4 * len(source.validator) + SPAN_BYTES * len(source.holds or ())


async def _header(
    source: RangeSource, provisional: str
) -> tuple[ModelFacts, tuple[tuple[str, int], ...]] | None:
    files = tuple((file.name, file.size_bytes) for file in source.files)
    try:
        headers = [found.header for found in await fetch_headers(source)]
        facts = await trio.to_thread.run_sync(facts_of, headers)
    except MeshError as error:
        log.info("no header from %s: %s", source.title, error)
        return None
    sizes = [size_bytes for _, size_bytes in files]
    if provisional_identity(facts.header_digest, sizes, source.validator) != provisional:
        log.warning("%s gave the header of another model", source.title)
        return None
    return facts, files
