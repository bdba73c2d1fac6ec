"""How much of this disk others may fill: by leases, or by orders to pull.

Whoever may borrow from this node may have it pull, and then decides how much. So what others order
leaves more of the disk free than the node's own user has to, and keeps within what the operator
names, headers included; it begins only so many models, and what was begun in vain goes again.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from meshnode.config import human_bytes
from meshnode.errors import MeshError, ResourceError
from meshnode.models.store.disk import allocated_bytes, told
from meshnode.models.store.slice import Slice
from meshnode.models.store.store import Store
from tunnels import PeerId

LEFT_FREE_BYTES = 10 * 2**30
"""Or a tenth of the disk, where that is less."""
MAX_ORDERED_MODELS = 256
MAX_BEGUN_BY_ONE = 64
"""Of those that are here, since this node was started: one member shall not shut out others."""
_REMEDY = "free some there (`mesh models gc --keep SIZE`), or raise --pull-limit"


class OverQuota(ResourceError):
    """The operator's bound, or the disk's, is reached by what others have this node pull."""


class Place:
    """One order's bounds. `begun`: slices that are here because of it, and whether the node's own
    user wants them by now."""

    def __init__(self, quota: Quota, asker: PeerId) -> None:
        self.asker = asker
        self.begun: dict[Path, Callable[[], bool]] = {}
        self._quota = quota

    def check_beginning(self, header_bytes: int) -> None:
        self._quota.check_beginning(self, header_bytes)

    def check_room(self, _part: Slice, missing_bytes: int) -> None:
        self._quota.check_room(self, missing_bytes)

    def note_begun(self, part: Slice, is_users: Callable[[], bool]) -> None:
        self._quota.note_begun(self.asker, part.folder)
        self.begun[part.folder] = is_users


class Quota:
    """I bound what others may have this node pull."""

    def __init__(self, store: Store, limit_bytes: int | None = None) -> None:
        """limit_bytes: for all in the store; None: what leaves enough of the disk."""
        self._store = store
        self._limit_bytes = limit_bytes
        self._promised: dict[Place, int] = {}
        self._begun: dict[Path, PeerId] = {}

    @asynccontextmanager
    async def place(self, asker: PeerId) -> AsyncIterator[Place]:
        """For one order: what it is promised counts against the others until it is over, and what
        it has begun in vain goes again then."""
        place = Place(self, asker)
        try:
            yield place
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._clear, place)
            self._promised.pop(place, None)

    def check_beginning(self, place: Place, header_bytes: int) -> None:
        """Blocks for the disk. Raises `OverQuota`."""
        folders = self._store.folders()
        if len(folders) >= MAX_ORDERED_MODELS:
            raise OverQuota(
                f"there are {MAX_ORDERED_MODELS} models and parts of models in "
                f"{self._store.folder.name} already, and no more begin at another node's word: "
                "remove some there (`mesh models` lists them, `mesh models rm NAME` removes one, "
                "`mesh models gc --keep SIZE` those that nobody has used for longest)"
            )
        begun = [one for one, asker in list(self._begun.items()) if asker == place.asker]
        if sum(one in folders for one in begun) >= MAX_BEGUN_BY_ONE:
            raise OverQuota(
                f"{MAX_BEGUN_BY_ONE} models were begun here at the same node's word, and are still "
                "here: remove some there (`mesh models rm NAME`)"
            )
        self._check(header_bytes + self._promised_to_others(place))

    def check_room(self, place: Place, missing_bytes: int) -> None:
        """Blocks for the disk. Raises `OverQuota`."""
        self._check(missing_bytes + self._promised_to_others(place))
        self._promised[place] = missing_bytes

    def note_begun(self, asker: PeerId, folder: Path) -> None:
        for gone in self._begun.keys() - set(self._store.folders()):
            del self._begun[gone]
        self._begun[folder] = asker

    def _clear(self, place: Place) -> None:
        for folder, is_users in place.begun.items():
            if is_users():
                continue
            with suppress(MeshError):  # somebody else works on it by now: it is not in vain
                self._store.remove_bare(folder)

    def _promised_to_others(self, place: Place) -> int:
        return sum(count for one, count in list(self._promised.items()) if one is not place)

    def _check(self, wanted_bytes: int) -> None:
        if not wanted_bytes:
            return
        free_bytes, total_bytes = self._space()
        left_bytes = min(LEFT_FREE_BYTES, total_bytes // 10)
        if free_bytes < wanted_bytes + left_bytes:
            raise OverQuota(
                f"{human_bytes(wanted_bytes)} are wanted of a disk with {human_bytes(free_bytes)} "
                f"free, and what others order leaves {human_bytes(left_bytes)} free: {_REMEDY}"
            )
        if self._limit_bytes is None:
            return
        held_bytes = sum(map(_allocated_bytes, self._store.folders()))
        if held_bytes + wanted_bytes > self._limit_bytes:
            raise OverQuota(
                f"{human_bytes(wanted_bytes)} are wanted beside the {human_bytes(held_bytes)} of "
                f"models that are here, and others may fill {human_bytes(self._limit_bytes)}: "
                f"{_REMEDY}"
            )

    def _space(self) -> tuple[int, int]:
        """Of the disk that the store is on: free to us, and in all."""
        folder = self._store.folder  # which is made when it is first needed
        there = next(path for path in (folder, *folder.parents) if path.exists())
        with told(there):
            found = os.statvfs(there)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def _allocated_bytes(folder: Path) -> int:
    try:
        return allocated_bytes(folder)
    except OSError:
        return 0  # removed meanwhile
