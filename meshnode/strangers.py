"""Sessions with peers that have shown us nothing yet: bounded in number, and in time."""

from __future__ import annotations

import trio

from meshnode.membership import Membership
from tunnels import Endpoint, Session

STRANGER_TIMEOUT_S = 30.0  # from a session's start to its introduction
MAX_STRANGERS = 64  # sessions not introduced yet; the rest of the endpoint's are for members


class Strangers:
    """I end sessions that nothing is made of."""

    def __init__(self, endpoint: Endpoint, membership: Membership) -> None:
        self._endpoint = endpoint
        self._membership = membership

    def make_room(self) -> None:
        """For who has just come, if there are too many: the oldest go."""
        strangers = [one for one in self._endpoint.sessions() if self._is_stranger(one)]
        for session in strangers[:-MAX_STRANGERS]:  # the oldest come first
            session.end("too many strangers are connected here")

    async def end_unless_introduced(self, session: Session) -> None:
        """Anyone with a key gets a session; whoever makes nothing of it loses it again."""
        with trio.move_on_after(STRANGER_TIMEOUT_S):
            await session.closed.wait()
        if self._is_stranger(session):
            session.end(f"no introduction within {STRANGER_TIMEOUT_S:.0f} s")

    def _is_stranger(self, session: Session) -> bool:
        present = self._endpoint.session(session.peer) is session
        return present and not self._membership.is_introduced(session.peer)
