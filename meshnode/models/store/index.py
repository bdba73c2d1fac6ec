"""Which slices are of an identity, without reading all of them for each question."""

from __future__ import annotations

import threading
from pathlib import Path

from meshnode.errors import ModelError
from meshnode.models.identity import Identity
from meshnode.models.slice_mark import SLICE_DOCUMENT
from meshnode.models.store.slice import read_document
from meshnode.models.store.store import Store

Stamp = tuple[int, int]


class IdentityIndex:
    """I know the identities of a store's slices, and read again those that have changed. To be
    called from threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[Stamp, Identity | None]] = {}

    def folders_of(self, identity: str) -> list[Path]:
        """Those of that root or provisional identity, by name."""
        with self._lock:
            known = {folder: self._identity(folder) for folder in self._store.folders()}
            self._known = {folder: one for folder, one in known.items() if one is not None}
            named = [(folder, found) for folder, (_, found) in self._known.items()]
        return [folder for folder, found in named if found and found.is_named(identity)]

    def _identity(self, folder: Path) -> tuple[Stamp, Identity | None] | None:
        """None where it is gone; without an identity where it is damaged."""
        stamp = document_stamp(folder)
        if stamp is None:
            return None
        known = self._known.get(folder)
        if known is not None and known[0] == stamp:
            return known
        try:
            return stamp, read_document(folder).identity
        except ModelError:
            return stamp, None


def document_stamp(folder: Path) -> Stamp | None:
    """Changes whenever the slice holds something else; None where it is gone."""
    try:
        seen = (folder / SLICE_DOCUMENT).stat()
    except OSError:
        return None
    return seen.st_mtime_ns, seen.st_ino
