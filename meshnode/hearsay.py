"""Members tell each other of further members of the mesh that they share: the `roster` service.

So whoever joins by one token finds all who are there. A record is signed by whom it is about and
comes with its grant, so that nobody can be made up; its addresses are hints, which a dial holds
against the address policy and the member's key. Of meshes that are not shared, nothing is told.
"""

from __future__ import annotations

import logging
import math

import trio

from discovery.grants import Grant, GrantError
from discovery.roster import Member
from meshnode.errors import MeshError
from meshnode.introduction import parse_records_untrusted, record_pages
from meshnode.membership import Acquaintance, Membership, patience
from meshnode.messages import MessageStream
from tunnels import PeerId, Session, Stream, TunnelError
from tunnels.allowance import Bucket, Rate

log = logging.getLogger(__name__)

TELL_TIMEOUT_S = 10.0
CHECK_INTERVAL_S = 30.0
MAX_PAGES = 64
TELLINGS = Rate(per_s=200, burst=8192)
"""Records passed on: each to all members, and one of them may make news of others without end.
What comes faster is told together."""

Record = tuple[Member, Grant]


class Hearsay:
    """I pass on whom we know, and take up whom others know."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._ledger = membership.ledger
        self._tellings = Bucket(TELLINGS, -math.inf)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                changed = self._membership.changed
                for known in self._membership.acquaintances():
                    if known.session is None or known.parting or not known.introduced:
                        continue
                    if news := self._news_for(known):
                        self._tellings.spend(trio.current_time(), len(news))
                        nursery.start_soon(self._tell, known.session, known, news)
                await trio.sleep(self._tellings.wait_s(trio.current_time()))
                with trio.move_on_after(CHECK_INTERVAL_S):
                    await changed.wait()

    def _news_for(self, known: Acquaintance) -> list[Record]:
        """What this peer has not been told of others in meshes that we share."""
        news = []
        for mesh in self._membership.shown_by(known.peer):
            for grant in self._ledger.members_of(mesh):
                member = self._membership.member(grant.peer)
                if member is None or grant.peer == known.peer:
                    continue
                if self._ledger.why_void(grant) is not None:
                    continue
                said = (member.name, member.candidates, grant)
                # The signature last: looking at one is work, and there are peers x members.
                if known.told_of.get((mesh, grant.peer)) != said and member.is_signed():
                    known.told_of[mesh, grant.peer] = said
                    news.append((member, grant))
        return news

    async def _tell(self, session: Session, known: Acquaintance, news: list[Record]) -> None:
        try:
            with trio.fail_after(TELL_TIMEOUT_S):
                async with await session.open("roster") as stream:
                    messages = MessageStream(stream)
                    for page in record_pages(news):
                        await messages.send(page)
                    await stream.send_eof()
                    await messages.receive_or_end_untrusted()
        except (TunnelError, MeshError, trio.TooSlowError) as error:
            log.info("%s was not told of other members: %s", known.peer.short, error)
            for member, grant in news:  # at the next look again
                known.told_of.pop((grant.mesh, member.peer), None)

    async def serve(self, stream: Stream) -> None:
        """A member tells of others."""
        with patience(stream):
            messages = MessageStream(stream)
            for _ in range(MAX_PAGES):
                message = await messages.receive_or_end_untrusted()
                if message is None:
                    break
                async with self._membership.hearing.of(stream.peer):
                    self._take(stream.peer, parse_records_untrusted(message, self._ledger.now()))
            await stream.send_eof()

    def _take(self, teller: PeerId, records: list[Record]) -> None:
        shared = self._membership.shown_by(teller)
        news = False
        for member, grant in records:
            if grant.mesh not in shared:
                continue
            try:
                news |= self._ledger.hear_of(member, grant)
            except GrantError as error:
                log.info("%s tells of %s: %s", teller.short, member.peer.short, error)
        if news:
            self._ledger.save_members()
            self._membership.notify()
