"""What a worker fetches because an orchestrator asks it to, as far as its operator allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from meshnode.config import PullSource
from meshnode.errors import DiskFull, NetworkError, ResourceError
from meshnode.models.bounds import Bounds
from meshnode.models.fetching import Fetcher
from meshnode.models.manifest import WantedTensor
from meshnode.models.store.disk import NoRoom
from meshnode.models.store.slice import Slice
from meshnode.models.store.store import Store
from meshnode.pipeline.pull_order import PullOrder
from meshnode.pipeline.quota import Quota
from tunnels import PeerId

KIND_WORDS = {
    PullSource.HUB: "from hubs",
    PullSource.URL: "from web servers",
    PullSource.PEERS: "from other members",
}


class Errand:
    """I carry out orders to pull."""

    def __init__(
        self,
        name: str,
        store: Store,
        fetcher: Fetcher,
        allowed: frozenset[PullSource],
        kind_of: Callable[[str], PullSource],
        quota: Quota,
    ) -> None:
        """name: this worker's. kind_of: which kind of source a reference names."""
        self._name = name
        self._store = store
        self._fetcher = fetcher
        self._allowed = allowed
        self._kind_of = kind_of
        self._quota = quota

    async def fetch(
        self,
        asker: PeerId,
        order: PullOrder,
        tensors: Sequence[WantedTensor],
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Brings these tensors onto this disk. Raises `MeshError`."""
        async with self._quota.place(asker) as bounds:
            part = await self._obtain(order, bounds)
            expected = {one.name: one.digest for one in tensors if one.digest is not None}
            try:
                await self._fetcher.fetch(
                    part,
                    [one.name for one in tensors],
                    expected,
                    on_progress,
                    refusal=self._refusal(order.reference),
                    bounds=bounds,
                )
            except (DiskFull, NoRoom) as error:  # whoever asked has a disk too
                raise type(error)(f"{self._name}: {error}") from error

    async def _obtain(self, order: PullOrder, bounds: Bounds) -> Slice:
        """What there is of it here: its header at least. Raises `MeshError`."""
        part = await trio.to_thread.run_sync(self._store.by_identity, order.provisional)
        if part is None:
            part = await self._fetcher.obtain_from_holders(
                order.reference, order.provisional, bounds
            )
        if part is None:
            refusal = self._refusal(order.reference)
            if refusal is not None:
                raise ResourceError(refusal)
            if self._kind_of(order.reference) is PullSource.PEERS:
                raise NetworkError(
                    f"no member that {self._name} is connected to gives it {order.reference}: look "
                    "at `mesh peers` there, or run `mesh pull` there with the model's own address"
                )
            part = await self._fetcher.obtain(order.reference, bounds)
        if part.identity.provisional != order.provisional:
            raise NetworkError(
                f"{self._name} finds another file at {order.reference} than the orchestrator saw: "
                "it was replaced there meanwhile; start again"
            )
        return part

    def _refusal(self, reference: str) -> str | None:
        """Why the source may not be asked; members may be all the same."""
        kind = self._kind_of(reference)
        if kind in self._allowed:
            return None
        return (
            f"{self._name} lacks its part of the model and pulls nothing {KIND_WORDS[kind]}: start "
            f"it with --allow-pull {kind.value}, or copy the file there"
        )
