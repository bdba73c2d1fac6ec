"""What an endpoint tells of its sessions, and whom."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from tunnels.peer import PeerId
from tunnels.redial import SessionBack, SessionSilent
from tunnels.session import Session

MAX_UNREAD_EVENTS = 4096


@dataclass(frozen=True)
class SessionUp:
    session: Session

    @property
    def peer(self) -> PeerId:
        return self.session.peer


@dataclass(frozen=True)
class SessionDown:
    session: Session
    reason: str

    @property
    def peer(self) -> PeerId:
        return self.session.peer


Change = SessionUp | SessionDown | SessionSilent | SessionBack


class Subscribers:
    """I tell all of them. One that leaves MAX_UNREAD_EVENTS unread is cut off."""

    def __init__(self) -> None:
        self._channels: list[trio.MemorySendChannel[Change]] = []

    def add(self) -> trio.MemoryReceiveChannel[Change]:
        send, receive = trio.open_memory_channel[Change](MAX_UNREAD_EVENTS)
        self._channels.append(send)
        return receive

    def tell(self, event: Change) -> None:
        for channel in list(self._channels):
            try:
                channel.send_nowait(event)
            except (trio.WouldBlock, trio.BrokenResourceError):
                channel.close()
                self._channels.remove(channel)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._channels.clear()
