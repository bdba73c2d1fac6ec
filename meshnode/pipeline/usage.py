"""Is a lease used? One that nobody opens an `rpc/` stream of holds memory for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

UNUSED_LEASE_S = 1800.0
"""Without one open `rpc/` stream. Other workers of a deployment may read a large model for their
first digests meanwhile; a loaded model keeps its streams open."""


class LeaseUse:
    """I know how long each lease has had no stream, and end its streams with it."""

    def __init__(self) -> None:
        self._open: dict[str, set[trio.CancelScope]] = {}
        self._last_s: dict[str, float] = {}

    @contextmanager
    def stream(self, lease_id: str) -> Iterator[None]:
        """While one of its streams is open. The body is cancelled when the lease ends."""
        with trio.CancelScope() as scope:
            streams = self._open.setdefault(lease_id, set())
            streams.add(scope)
            try:
                yield
            finally:
                streams.remove(scope)
                if lease_id in self._last_s:
                    self._last_s[lease_id] = trio.current_time()

    def end(self, lease_id: str) -> None:
        """The lease is over. A peer that neither reads nor writes would not notice, and keep its
        streams for as long as its session."""
        for scope in self._open.pop(lease_id, ()):
            scope.cancel()

    async def until_unused(self, lease_id: str) -> None:
        """From the grant on: returns when the lease had no stream for UNUSED_LEASE_S."""
        self._last_s[lease_id] = trio.current_time()
        try:
            while True:
                unused_s = trio.current_time() - self._last_s[lease_id]
                if self._open.get(lease_id):
                    unused_s = 0.0
                elif unused_s >= UNUSED_LEASE_S:
                    return
                await trio.sleep(UNUSED_LEASE_S - unused_s)
        finally:
            del self._last_s[lease_id]
