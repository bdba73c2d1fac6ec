"""How each peer is reached and how far away it is: `mesh peers`, `mesh ping`, changes of path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trio

from meshnode.connections import Connections
from meshnode.errors import NetworkError, UsageError
from meshnode.events import Emit, Event, Kind
from meshnode.membership import Membership
from tunnels import BadFrame, Endpoint, LinkStats, PeerId, Session, parse_peer_id_untrusted

PATH_LOOK_S = 5.0
"""How late an address that changes under a link is noticed. A link that comes or goes tells."""
REACH_S = 6.0  # for a member that is not connected; together with a round, what a request may take
ROUND_S = 3.0  # for the answers to one round of pings
MIN_ID_LETTERS = 4
Path = tuple[str, str, bool]
"""Kind of link, address, whether relayed."""


class Peers:
    """I tell over which paths this node's peers are reached."""

    def __init__(
        self, endpoint: Endpoint, membership: Membership, connections: Connections, emit: Emit
    ) -> None:
        self._endpoint = endpoint
        self._membership = membership
        self._connections = connections
        self._emit = emit

    # -- answers ------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """Everybody there is a session with; JSON-ready."""
        return [self._row(session) for session in self._endpoint.sessions()]

    async def answer_peers(self, _request: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"peers": self.rows()}

    async def answer_ping(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """One round trip over each link to the peer, which is dialled where there is none. Raises
        `UsageError` for a peer that is not known, `NetworkError` for one that cannot be reached."""
        peer = self.named(str(request.get("peer", "")))
        session = await self.reach(peer)
        took_s: dict[tuple[str, str], float] = {}

        def answered(link: LinkStats, seconds: float) -> None:
            took_s[link.kind, link.remote] = seconds

        links = session.links()
        with trio.move_on_after(ROUND_S):
            await session.ping(answered)
        rows = [
            _path_row(link) | {"took_ms": _ms(took_s.get((link.kind, link.remote)))}
            for link in links
        ]
        return {"name": self._membership.member_name(peer), "peer": str(peer), "links": rows}

    async def reach(self, peer: PeerId) -> Session:
        """The session to it, which is dialled where there is none. Raises `NetworkError`."""
        session = self._endpoint.session(peer)
        if session is not None:
            return session
        name = self._membership.member_name(peer)
        with trio.move_on_after(REACH_S):
            await self._connections.dialling.reach(peer)
        session = self._endpoint.session(peer)
        if session is None:
            raise NetworkError(
                f"{name} ({peer.short}) is not connected and does not answer at the addresses "
                "known of it: is its node running?"
            )
        return session

    def named(self, text: str) -> PeerId:
        """Who is meant: by id, by name, or by the beginning of an id. Names are the peers' own
        choice, another one's id among them: a whole id is no name. Raises `UsageError`."""
        known = {one.peer for one in self._membership.members()}
        known |= {session.peer for session in self._endpoint.sessions()}
        try:
            whole = parse_peer_id_untrusted(text)
        except BadFrame:
            fits = sorted(peer for peer in known if self._is_meant(text, peer))
        else:
            fits = [whole] if whole in known else []
        if self._is_meant(text, self._endpoint.peer) and not fits:
            raise UsageError(f"{text!r} is this node itself: name another (`mesh members`)")
        if len(fits) > 1:
            ids = ", ".join(str(peer) for peer in fits)
            raise UsageError(f"{text!r} may be any of {ids}: give more letters of the id")
        if not fits:
            raise UsageError(f"there is no peer {text!r}: `mesh members` lists those known")
        return fits[0]

    def _is_meant(self, text: str, peer: PeerId) -> bool:
        begins = len(text) >= MIN_ID_LETTERS and str(peer).startswith(text.lower())
        return begins or text == self._membership.member_name(peer)

    # -- changes of path ----------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tells of each change of path of a peer that was told of as connected."""
        async with trio.open_nursery() as nursery:

            def connected(session: Session) -> None:
                nursery.start_soon(self._follow, session, _path(session))

            self._connections.on_connected = connected
            task_status.started()
            await trio.sleep_forever()

    async def _follow(self, session: Session, told: Path | None) -> None:
        while not session.closed.is_set():
            with trio.move_on_after(PATH_LOOK_S):
                await session.wait_links_changed()
            now = _path(session)
            if now != told and not session.closed.is_set():
                self._tell(session.peer, told, now)
                told = now

    def _tell(self, peer: PeerId, before: Path | None, now: Path | None) -> None:
        name = self._membership.member_name(peer)
        link, address, relayed = now or (None, None, None)
        data = {"peer": str(peer), "name": name, "link": link, "address": address}
        who = f"{name} ({peer.short})"
        if now is None:
            text = f"{who} is out of reach: what runs waits while a path is looked for"
        elif before is None:
            text = f"{who} is reached again, {_path_text(now)}"
        else:
            text = f"{who} is now reached {_path_text(now)}; before, {_path_text(before)}"
        self._emit(Event(Kind.PATH, text, data | {"relayed": relayed}))

    # -- rows ---------------------------------------------------------------------------------

    def _row(self, session: Session) -> dict[str, Any]:
        peer, stats = session.peer, session.stats
        links = session.links()
        rows = [_link_row(link, self._unix_s(link.since_s)) for link in links]
        used = rows[0] if rows else {}
        return {
            "name": self._membership.member_name(peer),
            "peer": str(peer),
            "member": self._membership.is_introduced(peer),
            "suspected": session.suspected,
            "silent_s": round(session.silence_s, 1) if session.suspected else None,
            **{key: used.get(key) for key in _OF_LINK_IN_USE},
            "bytes_in": stats.bytes_in,
            "bytes_out": stats.bytes_out,
            "since": self._unix_s(session.since_s),
            "links": rows,
        }

    def _unix_s(self, moment_s: float) -> int:
        return int(self._membership.ledger.now() - (trio.current_time() - moment_s))


def _path(session: Session) -> Path | None:
    links = session.links()
    return (links[0].kind, links[0].remote, links[0].relayed) if links else None


def _path_text(path: Path) -> str:
    kind, address, relayed = path
    return f"{'relayed' if relayed else 'directly'} over {kind} at {address}"


def _path_row(link: LinkStats) -> dict[str, Any]:
    return {
        "link": link.kind,
        "address": link.remote,
        "relayed": link.relayed,
        "in_use": link.in_use,
    }


_OF_LINK_IN_USE = ("link", "address", "relayed", "rtt_ms", "smoothed_rtt_ms", "jitter_ms", "loss")


def _link_row(link: LinkStats, since: int) -> dict[str, Any]:
    return {
        **_path_row(link),
        "dialled_here": link.dialled_here,
        "suspected": link.suspected,
        "rtt_ms": _ms(link.rtt_s),
        "smoothed_rtt_ms": _ms(link.smoothed_rtt_s),
        "jitter_ms": _ms(link.jitter_s),
        "loss": None if link.loss is None else round(link.loss, 5),
        "bytes_in": link.bytes_in,
        "bytes_out": link.bytes_out,
        "since": since,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
