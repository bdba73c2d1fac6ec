"""Is a lease used? One that nobody opens an `rpc/` stream of holds memory for nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import trio

UNUSED_LEASE_S = 1800.0
"""Without one open `rpc/` stream. Other workers of a deployment may read a large model for their
first digests meanwhile; a loaded model keeps its streams open."""


class LeaseUse:
    """I know how long each lease has had no stream."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._last_s: dict[str, float] = {}

    @contextmanager
    def stream(self, lease_id: str) -> Iterator[None]:
        """While one of its streams is open."""
        self._open[lease_id] += 1
        try:
            yield
        finally:
            if lease_id in self._last_s:
                self._open[lease_id] -= 1
                self._last_s[lease_id] = trio.current_time()

    async def until_unused(self, lease_id: str) -> None:
        """From the grant on: returns when the lease had no stream for UNUSED_LEASE_S."""
        self._last_s[lease_id] = trio.current_time()
        try:
            while True:
                unused_s = trio.current_time() - self._last_s[lease_id]
                if self._open[lease_id]:
                    unused_s = 0.0
                elif unused_s >= UNUSED_LEASE_S:
                    return
                await trio.sleep(UNUSED_LEASE_S - unused_s)
        finally:
            del self._last_s[lease_id]
            self._open.pop(lease_id, None)
