"""The links of one session: which of them is used, and since when none was heard."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import trio

from tunnels.errors import BadFrame, LinkClosed, SessionClosed
from tunnels.handshake import Role
from tunnels.heartbeat import SUSPECT_S, Heartbeat
from tunnels.link import Channel, CloseCode, Link, ProvenLink
from tunnels.paths import Choice, Path, choose
from tunnels.peer import PeerId

RELAY = "relay"  # the kind of link whose bytes go through somebody else
MAX_LINKS = 4
TICK_S = 0.25  # while one is silent; a second otherwise
IDLE_TICK_S = 1.0
# A link that is silent while another is heard: what is on it has moved long before.
GIVEN_UP_AFTER_S = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remote:
    """Where a link came from or led to. takes_dials: it is the socket that also listens."""

    host: str
    port: int
    takes_dials: bool


class Links(Sequence[ProvenLink]):
    """I know which links stand, rank them, and notice when they fall silent."""

    def __init__(self, me: PeerId, peer: PeerId, rank_of: Callable[[Link], int]) -> None:
        self.changed = trio.lowlevel.ParkingLot()
        """One came or went; or all have fallen silent, or one of them is heard again."""
        self.closed = trio.Event()
        """The session has ended: none comes any more."""
        self.close_reason: str | None = None
        self.beats: dict[Link, Heartbeat] = {}
        self._peer = peer
        self._me_first = me < peer
        self._rank_of = rank_of
        self._links: list[ProvenLink] = []
        self._choice: Choice[Link] = Choice()
        self._past_bytes_in = 0
        self._past_bytes_out = 0
        self._heard_s = trio.current_time()  # on links that are gone
        self._past_remotes: deque[Remote] = deque(maxlen=MAX_LINKS)
        self._looked_s = trio.current_time()
        self._suspected = False
        self._heard_since_s = trio.current_time()

    # --- which --------------------------------------------------------------------------

    @overload
    def __getitem__(self, index: int) -> ProvenLink: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ProvenLink]: ...
    def __getitem__(self, index: int | slice) -> ProvenLink | Sequence[ProvenLink]:
        return self._links[index]

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[ProvenLink]:
        return iter(list(self._links))

    @property
    def best(self) -> Link | None:
        """As paths.py says; of those that are alike the one dialled by the lower PeerId, so both
        ends agree; then the newest: whoever dialled it again had a reason."""
        standing = [one for one in self._links if not one.link.closed.is_set()]
        standing.sort(key=self._preference)
        paths = [self._path(one.link) for one in standing]
        self._choice = choose(self._choice, paths, trio.current_time())
        return self._choice.key

    def _path(self, link: Link) -> Path[Link]:
        beat = self.beats.get(link)
        return Path(
            link,
            self._rank_of(link),
            relayed=link.kind == RELAY,
            rtt_s=None if beat is None else beat.rtt_s,
            suspected=self.is_silent(link),
        )

    def _preference(self, proven: ProvenLink) -> tuple[bool, int, bool, int]:
        link = proven.link
        dialled_here = link.role is Role.DIALLER
        age = -self._links.index(proven)
        return self.is_silent(link), self._rank_of(link), dialled_here != self._me_first, age

    def is_silent(self, link: Link) -> bool:
        """Nothing was heard on it for a while, or it is gone."""
        beat = self.beats.get(link)
        return beat is None or beat.suspected

    async def open_channel(self) -> Channel:
        """Over the best one; waits for one to stand. Raises SessionClosed."""
        while not self.closed.is_set():
            link = self.best
            if link is None:
                await self.changed.park()
                continue
            try:
                return await link.open_channel()
            except LinkClosed:
                await trio.lowlevel.checkpoint()  # its own task is about to drop it
        raise SessionClosed(
            f"the session with {self._peer.short} is over"
            + (f": {self.close_reason}" if self.close_reason else "; connect again")
        )

    # --- coming and going ---------------------------------------------------------------

    def add(self, proven: ProvenLink, is_busy: Callable[[], bool]) -> Heartbeat:
        best = self.best
        self._links.append(proven)
        beat = self.beats[proven.link] = Heartbeat(proven, is_busy)
        in_use = next((one for one in self._links if one.link is best), None)
        if in_use is not None and self._preference(proven) < self._preference(in_use):
            self._choice = Choice(proven.link, self._choice.left)
        self.changed.unpark_all()
        return beat

    def remove(self, proven: ProvenLink) -> None:
        link = proven.link
        self._links.remove(proven)
        del self.beats[link]
        self._past_bytes_in += link.bytes_in
        self._past_bytes_out += link.bytes_out
        self._heard_s = max(self._heard_s, link.last_heard_s)
        if (remote := _remote(link)) is not None:
            self._past_remotes.append(remote)
        self.changed.unpark_all()

    def break_off(self, error: BadFrame) -> None:
        """The peer has broken the protocol."""
        log.warning("peer %s broke the protocol: %s", self._peer.short, error)
        for proven in self:
            proven.link.close(CloseCode.PROTOCOL_ERROR, str(error))

    def end(self, reason: str) -> None:
        """With the session, whose other side learns why."""
        self.close_reason = reason
        self.closed.set()
        for proven in self:
            proven.link.close(CloseCode.SESSION_OVER, reason)
        self.changed.unpark_all()

    @property
    def bytes_in(self) -> int:
        return self._past_bytes_in + sum(one.link.bytes_in for one in self._links)

    @property
    def bytes_out(self) -> int:
        return self._past_bytes_out + sum(one.link.bytes_out for one in self._links)

    @property
    def remotes(self) -> list[Remote]:
        """Of the links that stand, and of the last that did."""
        standing = [_remote(proven.link) for proven in self._links]
        found = [one for one in standing if one is not None]
        return list(dict.fromkeys((*found, *self._past_remotes)))

    # --- silence ------------------------------------------------------------------------

    @property
    def rtt_s(self) -> float | None:
        """Of the best one."""
        best = self.best
        return None if best is None else self.beats[best].rtt_s

    @property
    def suspected(self) -> bool:
        """None of them was heard for SUSPECT_S, or there is none."""
        return all(beat.suspected for beat in self.beats.values())

    async def wait_heard(self) -> None:
        """Until the peer is not suspected, or the session has ended."""
        while self.suspected and not self.closed.is_set():
            await self.changed.park()

    @property
    def silence_s(self) -> float:
        """How long nothing was heard of the peer."""
        heard = [self._heard_s, *(one.link.last_heard_s for one in self._links)]
        return trio.current_time() - max(heard)

    @property
    def heard_for_s(self) -> float:
        """How long the peer has not been suspected; 0 while it is."""
        if self._suspected or self.suspected:
            return 0.0
        return trio.current_time() - self._heard_since_s

    def doubt(self) -> None:
        """The network has changed: whoever does not answer soon is silent."""
        for beat in self.beats.values():
            beat.doubt()

    def look(self) -> float:
        """Notice what time has changed. How long until I want to look again."""
        now = trio.current_time()
        if now - self._looked_s > SUSPECT_S:
            # This process was asleep, not the peers: their silence counts from now.
            self._heard_s = now
            for proven in self._links:
                proven.link.last_heard_s = now
        self._looked_s = now
        suspected = self.suspected
        if suspected != self._suspected:
            self._suspected = suspected
            self._heard_since_s = now
            self.changed.unpark_all()
        silent = [beat for beat in self.beats.values() if beat.suspected]
        if not suspected:
            for beat in silent:
                beat.give_up_after(GIVEN_UP_AFTER_S)
        doubted = any(beat.doubted for beat in self.beats.values())
        return TICK_S if silent or doubted or suspected else IDLE_TICK_S

    def close_silent(self, reason: str) -> None:
        """Those that are silent have been replaced; their streams move by themselves."""
        for proven in self:
            if self.is_silent(proven.link):
                proven.link.close(CloseCode.LINK_OVER, reason)


def _remote(link: Link) -> Remote | None:
    """None for a link that does not lead straight to an address of the peer's."""
    if link.kind not in ("quic", "tcp"):
        return None
    host, _, port = link.remote.rpartition(":")
    takes_dials = link.kind == "quic" and link.role is Role.LISTENER
    return Remote(host.strip("[]"), int(port), takes_dials)
