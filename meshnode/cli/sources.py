"""A model named by its source on a command line: its header, fetched once and kept."""

from __future__ import annotations

from pathlib import Path

import trio

from meshnode.models.fetching import Fetcher
from meshnode.models.pull.reference import parse_reference
from meshnode.models.store.slice import Slice
from meshnode.models.store.store import Store
from meshnode.models.web import Web


def begin_slice(folder: Path, source: str, *, offline: bool) -> Slice:
    """What there is of the model at this source: its header at least, a few megabytes, which stays
    for whoever comes next. folder: of the store. source: as its user wrote it. Raises `MeshError`.
    """
    fetcher = Fetcher(Store(folder), Web(offline=offline, named=source).open_for_user)
    return trio.run(fetcher.obtain, str(parse_reference(source)))
