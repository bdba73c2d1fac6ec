"""A peer that has said nothing for long: not dead (decision 9), but nobody should begin to wait."""

from __future__ import annotations

import trio

from tunnels import Session

HELD_AFTER_S = 10.0


async def long_silence(session: Session) -> bool:
    """Waits until the peer has been silent for HELD_AFTER_S; False once the session has ended."""
    while not session.closed.is_set():
        if not session.suspected:
            await session.wait_links_changed()
            continue
        with trio.move_on_after(HELD_AFTER_S - session.silence_s):
            await session.wait_heard()
        if session.suspected and not session.closed.is_set():
            return True
    return False
