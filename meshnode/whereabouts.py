"""Members are told when the places where this node can be reached change: it says hello again.

Its word, signed and with a higher number, replaces the one before in their rosters, and they pass
it on (hearsay.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import trio

from tunnels import Endpoint, Session
from tunnels.outside import OutsideView
from tunnels.peer import format_address

PAUSE_S = 5.0
"""Between two rounds, however often something changes: each tells every member."""


class Whereabouts:
    """I watch our candidates. introduced: sessions to members; show: says hello on one again."""

    def __init__(
        self,
        endpoint: Endpoint,
        introduced: Callable[[], Iterable[Session]],
        show: Callable[[Session], Awaitable[None]],
    ) -> None:
        self._endpoint = endpoint
        self._introduced = introduced
        self._show = show

    async def run(self) -> None:
        """Until cancelled, of an endpoint that runs."""
        told = self._endpoint.candidates()
        async with trio.open_nursery() as nursery:
            while True:
                changed = self._endpoint.candidates_changed
                places = self._endpoint.candidates()
                if set(places) == set(told):
                    await changed.wait()
                    continue
                told = places
                for session in self._introduced():
                    nursery.start_soon(self._show, session)
                await trio.sleep(PAUSE_S)


def network_row(outside: OutsideView) -> dict[str, Any]:
    """How this node looks from outside, by IP version; JSON-ready."""
    return {
        f"ipv{version}": {
            "nat": facts.kind.name.lower(),
            "seen_at": [format_address(*one) for one in facts.mapped],
            "keeps_port": facts.keeps_port,
        }
        for version in (4, 6)
        for facts in (outside.facts(version),)
    }
