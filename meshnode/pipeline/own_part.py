"""What the orchestrator's own disk has of the model, and fetches: for itself, and for others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import trio

from meshnode.config import human_bytes
from meshnode.engine.errors import WeightsAbsent
from meshnode.events import Emit, Event, Kind
from meshnode.gateway.view import WorkerProgress
from meshnode.models.manifest import Manifest
from meshnode.models.proof import UNPROTECTED, whose_word
from meshnode.models.store.hearsay import Difference, contradicted, note_told
from meshnode.models.store.slice import open_slice
from meshnode.pipeline.part import Part


class OwnPart:
    """I fetch this machine's part of one deployment, and know what is here then. `manifest`: None
    until that is known, and where nobody asks."""

    def __init__(
        self,
        part: Part | None,
        manifest: Manifest | None,
        emit: Emit,
        show: Callable[[WorkerProgress], None],
    ) -> None:
        """part: None where the model is whole here."""
        self._part = part
        self.manifest = manifest
        self._emit = emit
        self._show = show
        self._lacked: set[str] = set()
        self._told: dict[str, dict[str, bytes]] = {}

    async def relay(self) -> None:
        """Fetches what workers lack and can have from nobody but this machine: before they are
        asked for leases, since they look for it at once. Raises `MeshError`."""
        part = self._part
        needs = await part.needs_of_others() if part and part.is_secret else {}
        if part is None or not needs:
            return
        names = {name for lacking in needs.values() for name in lacking}
        sizes = {tensor.name: tensor.nbytes for tensor in part.slice.facts.tensors}
        size_bytes = sum(sizes[name] for name in names)
        source = part.slice.document.source
        text = (
            f"{source} carries a secret that stays on this machine, so {', '.join(needs)} cannot "
            f"fetch from there: the {human_bytes(size_bytes)} that they lack come here, and they "
            "take them from here; to have each machine fetch its own, run `mesh pull` with the "
            "whole address there"
        )
        self._emit(Event(Kind.WARNING, text, {"nodes": list(needs), "bytes": size_bytes}))
        self.manifest = await part.fetch(self._tell, tuple(names))

    async def fetch(self) -> None:
        """What this machine computes with. Raises `MeshError`."""
        if self._part is not None:
            self.manifest = await self._part.fetch(self._tell)

    def hear(self, node: str, teller: str, digests: bytes) -> None:
        """What a lender's grant says of its tensors. teller: what to call it. Raises
        `BadMessage`."""
        if self._part is not None:
            self._told[teller] = self._part.told(node, digests)

    async def keep_told(self) -> None:
        """Keeps what was heard, as hearsay, and tells the user where two words differ."""
        part = self._part
        if part is None or self.manifest is None:
            return
        here = {tensor.name: tensor.digest for tensor in self.manifest.tensors}
        found = contradicted(part.slice.document.told, here)
        for teller, told in self._told.items():
            found += await trio.to_thread.run_sync(note_told, part.slice.folder, teller, told)
        for (one, other), names in _by_pair(found).items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            told_by = f"{one} said earlier" if other == one else f"{other} said that it holds"
            text = (
                f"{one} has other bytes of {names[0]}{more} of {part.slice.name} than "
                f"{told_by if other else 'this machine'}: one of the two is wrong, and so may "
                "answers be; run `mesh models verify` on both machines, or remove the model there "
                "and have it pulled again"
            )
            self._emit(Event(Kind.WARNING, text, {"tensors": names, "nodes": [one, other]}))

    async def tell_proof(self) -> None:
        """Says on whose word alone the model's bytes are what they are, where it is so."""
        if self._part is None:
            return
        part = await trio.to_thread.run_sync(open_slice, self._part.slice.folder)
        if (word := whose_word(part.document)) is not None:
            kind = Kind.WARNING if word == UNPROTECTED else Kind.MODELS
            data = {"model": part.name, "source": part.document.source}
            self._emit(Event(kind, f"{part.name}: {word}", data))

    async def fetch_lacking(self, absent: WeightsAbsent, what: str) -> bool:
        """Fetches what a load ended for the want of; whether there was any such thing. `what`: the
        load's end in words. Raises `MeshError`."""
        part = self._part
        if part is None or self.manifest is None or absent.tensor in self._lacked:
            return False
        names = part.lacking(absent.tensor, self.manifest)
        if not names:
            return False
        self._lacked.update(names)
        text = f"the plan did not count on it, but {what}: fetching it"
        self._emit(Event(Kind.WARNING, text, {"tensors": list(names)}))
        self.manifest = await part.fetch(self._tell, names)
        return True

    def _tell(self, done_bytes: int, total_bytes: int) -> None:
        assert self._part is not None
        self._show(WorkerProgress(self._part.local, done_bytes, total_bytes))


def _by_pair(found: Iterable[Difference]) -> dict[tuple[str, str | None], list[str]]:
    pairs: defaultdict[tuple[str, str | None], list[str]] = defaultdict(list)
    for one in found:
        pairs[one.one, one.other].append(one.tensor)
    return pairs
