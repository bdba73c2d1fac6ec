"""Members on the local network: this node announces itself to them, and follows what they announce.

An announcement is a hint of where a member is and nothing more. Of members that we know, its places
are tried before those we knew; a node that we have not met is dialled at a bounded rate and has to
show its grant. Both prove their keys first, and the tunnel's address policy holds for every place.
The first who fails, of each kind, is told of in the log.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection
from importlib.metadata import version

import trio

from discovery.announcement import ENTROPY_BYTES, MAX_PLACES, encode_announcement
from discovery.hints import Hint, HintBook, Refusal
from discovery.mdns import Mdns, MdnsFailed, open_mdns
from meshnode.dialling import Dialling
from meshnode.errors import MeshError
from meshnode.events import Emit, Event, Kind
from meshnode.membership import Membership
from meshnode.nurseries import bare_nursery
from tunnels import Endpoint, PeerId, TunnelError
from tunnels.allowance import Bucket, Rate
from tunnels.interfaces import InterfaceWatch, watch_interfaces

log = logging.getLogger(__name__)

LOOK_S = 1.5
"""How long a node that misses members waits for them to be heard before it makes its first plan."""
MEETINGS = Rate(per_s=1.0, burst=8)  # dials of nodes that we have not met
MAX_MEETINGS = 4  # at once
RECHECK_S = 60.0  # our own places and meshes, should they have changed without a word
TRY_AGAIN_S = 10.0
RESCAN_AGAIN_S = 1.0


class Neighbours:
    """I find the members of our meshes on the local network, and let them find us."""

    def __init__(
        self,
        endpoint: Endpoint,
        membership: Membership,
        dialling: Dialling,
        emit: Emit,
        only_host: str | None = None,
    ) -> None:
        """only_host: the one address that we listen on; None: every interface."""
        self._endpoint = endpoint
        self._membership = membership
        self._dialling = dialling
        self._emit = emit
        self._only_host = only_host
        self._deaf = False
        self._changed = trio.Event()  # something about us
        self._meshes: Collection[bytes] = ()
        self._book = self._new_book()
        self._meeting: set[PeerId] = set()
        self._at_once = trio.CapacityLimiter(MAX_MEETINGS)
        self._told: set[str] = set()

    async def run(self) -> None:
        """Until cancelled. Without multicast DNS, says so once and tries again later."""
        self._meetings = Bucket(MEETINGS, trio.current_time())
        while True:
            try:
                await self._take_part()
            except MdnsFailed as error:
                self._tell_unavailable(error)
            await trio.sleep(TRY_AGAIN_S)

    async def look_around(self) -> None:
        """Returns once the members that we know are connected, or have had the time to be heard."""
        with trio.move_on_after(LOOK_S):
            while self._misses_members() and not self._deaf:
                changed = self._membership.changed
                await changed.wait()

    def _misses_members(self) -> bool:
        members = self._membership.members()
        if not members:  # of a mesh that we have joined, all may have been lost from sight
            return len(self._membership.ledger.meshes()) > 1
        return not all(self._membership.is_introduced(member.peer) for member in members)

    async def _take_part(self) -> None:
        with watch_interfaces() as watch:
            async with open_mdns(self._only_host) as mdns, bare_nursery() as nursery:
                nursery.start_soon(mdns.ask)
                nursery.start_soon(self._announce, mdns)
                nursery.start_soon(self._follow_membership)
                nursery.start_soon(self._follow_interfaces, mdns, watch)
                nursery.start_soon(self._listen, mdns, nursery)

    # -- us to others -------------------------------------------------------------------------

    async def _announce(self, mdns: Mdns) -> None:
        """Keeps what we say up to date."""
        said: object = None
        entropy, seq = b"", 0
        while True:
            changed = self._changed
            meshes = self._membership.ledger.meshes()
            known = self._endpoint.candidates()
            here = (one for one in known if one.kind == "host" and one.via is None)
            places = tuple(here)[:MAX_PLACES]
            if meshes != self._meshes or not entropy:
                self._meshes, entropy = meshes, secrets.token_bytes(ENTROPY_BYTES)
                self._book = self._new_book()
                mdns.ask_now()  # who was a stranger may be a member now
            if places and said != (meshes, places):
                seq = max(seq + 1, int(self._membership.ledger.now() * 1000))
                record = encode_announcement(
                    self._endpoint.identity.sign,
                    peer=self._endpoint.peer,
                    seq=seq,
                    version=version("mesh-llm-node"),
                    name=self._membership.name,
                    places=places,
                    meshes=meshes,
                    entropy=entropy,
                )
                await mdns.announce(self._endpoint.peer, record, places)
                if said is None:
                    self._tell_announced()
                said = (meshes, places)
            with trio.move_on_after(RECHECK_S):
                await changed.wait()

    async def _follow_membership(self) -> None:
        while True:
            await self._membership.changed.wait()
            self._wake()

    async def _follow_interfaces(self, mdns: Mdns, watch: InterfaceWatch) -> None:
        while True:
            await watch.wait_changed()
            self._wake()
            await self._rescan(mdns)

    async def _rescan(self, mdns: Mdns) -> None:
        while True:
            try:
                await mdns.rescan()
            except MdnsFailed as error:  # what was there a moment ago has gone
                log.info("%s; looking again", error)
                await trio.sleep(RESCAN_AGAIN_S)
            else:
                return

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # -- others to us -------------------------------------------------------------------------

    def _new_book(self) -> HintBook:
        known = self._membership.member
        return HintBook(self._endpoint.peer, self._meshes, lambda peer: known(peer) is not None)

    async def _listen(self, mdns: Mdns, nursery: trio.Nursery) -> None:
        while True:
            for record in await mdns.heard():
                self._hear_untrusted(record, nursery)
                await trio.lowlevel.checkpoint()  # each may have cost a signature

    def _hear_untrusted(self, record: bytes, nursery: trio.Nursery) -> None:
        match self._book.hear_untrusted(record, trio.current_time()):
            case Refusal() as refusal:
                text = f"an announcement on the local network is not followed: {refusal.value}"
                self._log_once(refusal.name, text)
            case Hint() as hint if self._membership.member(hint.peer) is not None:
                self._dialling.sighted(hint.peer, hint.places)
            case Hint() as hint if hint.peer not in self._meeting:
                self._meeting.add(hint.peer)
                nursery.start_soon(self._meet, hint)

    async def _meet(self, hint: Hint) -> None:
        try:
            async with self._at_once:
                self._meetings.spend(trio.current_time(), 1)
                await trio.sleep(self._meetings.wait_s(trio.current_time()))
                if self._membership.is_introduced(hint.peer):
                    return  # it was quicker
                await self._dialling.meet(hint.peer, hint.places, hint.meshes)
        except (MeshError, TunnelError) as error:
            self._book.turn_down(hint.peer, trio.current_time())
            text = f"{hint.name} ({hint.peer.short}) says on the local network that it is a member"
            self._log_once("unmet", f"{text}, but it cannot be met: {error}")
        finally:
            self._meeting.discard(hint.peer)

    # -- what is told -------------------------------------------------------------------------

    def _log_once(self, kind: str, text: str) -> None:
        """The first of its kind: anybody on the network can cause any number."""
        if kind not in self._told:
            self._told.add(kind)
            log.warning("%s; more of the kind is not told", text)

    def _tell_announced(self) -> None:
        text = "announces itself on the local network: `mesh discover` lists who does"
        self._emit(Event(Kind.NODE, text, {"mdns": True}))

    def _tell_unavailable(self, error: MdnsFailed) -> None:
        if not self._deaf:
            text = f"{error}; members on this network are looked for at their last addresses only"
            self._emit(Event(Kind.WARNING, text, {"mdns": False}))
        self._deaf = True
        self._membership.notify()
