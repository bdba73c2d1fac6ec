"""The worker's side of a lease, before its rpc-server: which tensors of its disk this may read.

What the order of a lease asks for and is not there is pulled first. Other tensors that are missing
are for the orchestrator to send.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from meshnode.errors import BadMessage, ResourceError
from meshnode.membership import Hearing
from meshnode.messages import MessageStream
from meshnode.models import manifest
from meshnode.models.manifest import BadManifest, WantedModel, WantedTensor, offered_files
from meshnode.models.shelf import LocalMatch, Shelf
from meshnode.models.shelf import Progress as Headway
from meshnode.models.store.thinning import note_needed
from meshnode.nurseries import accompanied_by
from meshnode.pipeline import pull_order
from meshnode.pipeline.protocol import Progress
from meshnode.pipeline.pull_order import PullOrder
from tunnels import PeerId

Fetch = Callable[
    [PeerId, PullOrder, Sequence[WantedTensor], Callable[[int, int], None]], Awaitable[None]
]
"""At somebody's word brings these tensors of a model onto this node's disk, and says how far it is:
done, total bytes. Raises `MeshError`: not allowed, the source is not there or has another file, the
disk is full."""


@dataclass(frozen=True)
class Matched:
    """`digests`: of the ordered tensors, packed; b"" where there was no order."""

    local: LocalMatch
    digests: bytes


class Matching:
    """I find what leases may read on this node's disk."""

    def __init__(self, shelf: Shelf, fetch: Fetch | None) -> None:
        """fetch: None where this node pulls nothing for others."""
        self._shelf = shelf
        self._fetch = fetch
        self._parsing = Hearing()  # a manifest of 25,000 tensors takes a tenth of a second

    async def match(
        self, owner: PeerId, model: str, wanted: bytes, order: bytes, messages: MessageStream
    ) -> Matched:
        """`wanted` and `order` as they came. How far it is, is told to the owner. Raises
        `MeshError`."""
        async with self._parsing.of(owner):
            try:
                whole = manifest.from_wire_untrusted(wanted)
            except BadManifest as error:
                raise BadMessage(str(error)) from None
            told = pull_order.from_wire_untrusted(order, len(whole.tensors)) if order else None
        found = await self._read(whole, model, messages)
        if told is None:
            return Matched(found, b"")
        needed = [whole.tensors[position] for position in told.needed]
        missing = [tensor for tensor in needed if tensor.name not in found.usable]
        if missing:
            await self._pull(owner, told, missing, messages)
            found = await self._read(whole, model, messages)
        if any(tensor.name not in found.usable for tensor in needed):
            raise ResourceError("what was pulled is gone again: ask once more")
        names = [tensor.name for tensor in needed]
        await trio.to_thread.run_sync(note_needed, offered_files(found.engine_manifest), names)
        digests = pull_order.pack_digests([found.usable[tensor.name] for tensor in needed])
        return Matched(found, digests)

    async def _read(self, wanted: WantedModel, model: str, messages: MessageStream) -> LocalMatch:
        """Our files against what is wanted; a first digest is told as it goes."""
        headway = Headway()

        async def tell() -> None:
            while True:
                await messages.send(Progress(*await headway.next()).to_message())

        async with accompanied_by(tell):
            match = await self._shelf.match(wanted, model, headway)
        return match

    async def _pull(
        self,
        owner: PeerId,
        order: PullOrder,
        missing: Sequence[WantedTensor],
        messages: MessageStream,
    ) -> None:
        if self._fetch is None:
            raise ResourceError(
                "this worker lacks its part of the model and pulls nothing: copy the file there, "
                "or start it with --allow-pull"
            )
        headway = Headway()

        async def tell() -> None:
            while True:
                done_bytes, total_bytes = await headway.next()
                await messages.send(Progress(done_bytes, total_bytes, pulls=True).to_message())

        async with accompanied_by(tell):
            await self._fetch(owner, order, missing, headway.tell)
