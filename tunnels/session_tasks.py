"""The tasks of one session, in its endpoint's nursery."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVarTuple

import trio

from tunnels.peer import PeerId

Given = TypeVarTuple("Given")

log = logging.getLogger(__name__)


class SessionTasks:
    """I run them. A bug in one ends the session, not the node."""

    def __init__(self, peer: PeerId, nursery: trio.Nursery, end: Callable[[str], None]) -> None:
        """end: the session, with a reason."""
        self._peer = peer
        self._nursery = nursery
        self._end = end

    def spawn(self, task: Callable[[*Given], Awaitable[None]], *given: *Given) -> None:
        async def contained() -> None:
            try:
                await task(*given)
            except Exception:
                log.exception("a task of the session with %s failed", self._peer.short)
                self._end("internal error")

        self._nursery.start_soon(contained)
