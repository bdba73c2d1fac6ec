"""What was taken back is passed on, and sessions that stand on it end: the `revocations` service.

Whatever is news in a mesh goes to every introduced member of it at once, and from there on. A
session ends as soon as a grant that the peer has shown on it is void, revoked or expired; before
that, the peer itself hears why. A peer that keeps a grant of another mesh connects again.
"""

from __future__ import annotations

import logging
import math

import trio

from discovery.revocations import Revocation
from meshnode.errors import MeshError
from meshnode.introducing import Introductions
from meshnode.introduction import revocation_pages
from meshnode.membership import Acquaintance, Membership, patience
from meshnode.messages import MessageStream
from tunnels import Session, Stream, TunnelError
from tunnels.allowance import Bucket, Rate

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 2.0
"""How often grants are held against the clock on the wall, which may be set at any time."""
TELL_TIMEOUT_S = 5.0
TELLINGS = Rate(per_s=20, burst=256)
"""Streams on which news is passed on: all members hear each, and one of them may make news without
end. What comes faster is told together."""
LOOK_PAUSE_S = 0.1  # between two looks: each is at all that is known of every peer connected
GOODBYE_S = 0.5
"""For telling a peer why its session ends. It may open nothing more then; what it runs goes on."""


class Removal:
    """I pass on what was taken back, and end the sessions that stand on it."""

    def __init__(self, membership: Membership, introductions: Introductions) -> None:
        self._membership = membership
        self._introductions = introductions
        self._ledger = membership.ledger
        self._tellings = Bucket(TELLINGS, -math.inf)

    async def run(self) -> None:
        """Looks at every session whenever there is news, and now and then."""
        async with trio.open_nursery() as nursery:
            while True:
                news = self._membership.news
                self._ledger.settle()
                may_tell = self._tellings.level(trio.current_time()) > 0  # all hear it, or none yet
                for known in self._membership.acquaintances():
                    self._look_at(known, nursery, may_tell)
                await trio.sleep(LOOK_PAUSE_S)
                with trio.move_on_after(CHECK_INTERVAL_S):
                    await news.wait()

    def _look_at(self, known: Acquaintance, nursery: trio.Nursery, may_tell: bool) -> None:
        if known.session is None or known.parting:
            return
        reason = self._why_part(known)
        if reason is not None:
            known.parting = True
            nursery.start_soon(self._part, known.session, known, reason)
        elif may_tell and known.introduced and (untold := self._untold(known)):
            self._tellings.spend(trio.current_time(), 1)
            known.told.update(one.digest for one in untold)
            nursery.start_soon(self._tell_on, known.session, known, untold)

    def _why_part(self, known: Acquaintance) -> str | None:
        for mesh, grant in known.grants.items():
            reason = self._ledger.why_void(grant)
            if reason is not None:
                return reason
            if self._ledger.grant(mesh) is None:
                return "this node is no longer a member of the mesh"
        return None

    def _untold(self, known: Acquaintance) -> list[Revocation]:
        said = [one for mesh in known.grants for one in self._ledger.revocations.of_mesh(mesh)]
        return [one for one in said if one.digest not in known.told]

    async def _part(self, session: Session, known: Acquaintance, reason: str) -> None:
        """Ends the session. The peer is told what it hangs on, if it listens for a moment."""
        void_by = self._ledger.revocations.void_by
        said = [one for grant in known.grants.values() if (one := void_by(grant)) is not None]
        said += [
            one for one in self._untold(known) if one not in said and self._may_hear(known, one)
        ]
        with trio.move_on_after(GOODBYE_S):
            if said and known.introduced:
                await self._send(session, said)
        session.end(reason)

    def _may_hear(self, known: Acquaintance, revocation: Revocation) -> bool:
        """A peer put out of one mesh hears no more of it; of meshes that we share still it does,
        and when we leave one, it hears that."""
        if revocation.issuer == self._ledger.identity.peer:
            return True
        return self._ledger.why_void(known.grants[revocation.mesh]) is None

    async def _tell_on(
        self, session: Session, known: Acquaintance, untold: list[Revocation]
    ) -> None:
        if not await self.tell(session, untold):
            known.told.difference_update(one.digest for one in untold)  # at the next look again

    async def tell(self, session: Session, revocations: list[Revocation]) -> bool:
        """Whether the peer has heard, and written, all of these."""
        with trio.move_on_after(TELL_TIMEOUT_S):
            return await self._send(session, revocations)
        return False

    async def _send(self, session: Session, revocations: list[Revocation]) -> bool:
        try:
            async with await session.open("revocations") as stream:
                messages = MessageStream(stream)
                for page in revocation_pages(revocations):
                    await messages.send(page)
                return await messages.receive_or_end_untrusted() is not None
        except (TunnelError, MeshError) as error:
            log.info("%s did not hear what was revoked: %s", session.peer.short, error)
            return False

    async def serve(self, stream: Stream) -> None:
        """A member tells what is news."""
        with patience(stream):
            messages = MessageStream(stream)
            meshes = frozenset(self._membership.shown_by(stream.peer))
            heard = await self._introductions.hear(stream.peer, messages, meshes)
            for known in self._membership.acquaintances():
                if known.peer == stream.peer:
                    known.told |= heard
            await messages.send({"ok": True})
            await stream.send_eof()
