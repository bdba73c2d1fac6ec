"""Members tell each other of the members of the meshes that they share: the `roster` service.

So whoever joins by one token finds all who are there, and does without the inviter from then on.
A record is signed by whom it is about and comes with its grant, so that nobody can be made up; its
addresses are hints, which a dial holds against the address policy and the member's key. Of meshes
that are not shared, nothing is told. Who tells whom, and when: `discovery.gossip`.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import trio

from discovery.digest import pack_keys
from discovery.gossip import Gossip, Talk
from discovery.grants import Grant, GrantError
from discovery.roster import Member
from meshnode.errors import BadMessage, MeshError
from meshnode.introduction import parse_records_untrusted, record_pages
from meshnode.member_book import Heard
from meshnode.membership import Membership, patience
from meshnode.messages import MessageStream
from tunnels import BadFrame, Candidate, PeerId, Session, Stream, TunnelError

log = logging.getLogger(__name__)

TALK_TIMEOUT_S = 10.0
LOOK_PAUSE_S = 0.05  # between two looks: each is at all that is known
CHECK_INTERVAL_S = 30.0
SAVE_EVERY_S = 10.0
"""What others pass on is on disk that late: it would be heard again."""
MAX_PAGES = 256

Record = tuple[Member, Grant]


class Hearsay:
    """I pass on whom we know, and take up whom others know."""

    def __init__(
        self, membership: Membership, candidates: Callable[[], Iterable[Candidate]]
    ) -> None:
        """candidates: where this node may be reached now."""
        self._membership = membership
        self._ledger = membership.ledger
        self._candidates = candidates
        self._gossips: dict[bytes, Gossip] = {}
        self._met: dict[bytes, dict[PeerId, Session]] = {}
        self._known: dict[bytes, set[PeerId]] = {}
        self._unsigned: dict[PeerId, int] = {}
        self._woken = trio.Event()
        self._is_unsaved = False
        self._saved_at_s = -math.inf

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._membership.follow, lambda: self._woken.set())
            while True:
                woken = self._woken = trio.Event()
                self._sync()
                self._save_when_due()
                for mesh, gossip in self._gossips.items():
                    for talk in gossip.due(trio.current_time()):
                        nursery.start_soon(self._talk, mesh, gossip, talk)
                await trio.sleep(LOOK_PAUSE_S)
                with trio.move_on_at(self._next_look_s()):
                    await woken.wait()

    def _next_look_s(self) -> float:
        deadlines = [gossip.next_deadline() for gossip in self._gossips.values()]
        if self._is_unsaved:
            deadlines.append(self._saved_at_s + SAVE_EVERY_S)
        return min([*deadlines, trio.current_time() + CHECK_INTERVAL_S])

    # -- what we know, told to the core -------------------------------------------------------

    def _sync(self) -> None:
        meshes = self._ledger.meshes()
        for mesh in [one for one in self._gossips if one not in meshes]:
            del self._gossips[mesh], self._met[mesh], self._known[mesh]
        for mesh in meshes:
            if mesh not in self._gossips:
                us = self._ledger.identity.peer
                gossip = Gossip(us, secrets.randbelow, trio.current_time())
                self._gossips[mesh], self._met[mesh], self._known[mesh] = gossip, {}, set()
            self._sync_neighbours(mesh)
            self._sync_records(mesh)

    def _sync_neighbours(self, mesh: bytes) -> None:
        gossip, met = self._gossips[mesh], self._met[mesh]
        present = {
            known.peer: known.session
            for known in self._membership.acquaintances()
            if known.session is not None and known.introduced and not known.parting
            if mesh in self._membership.shown_by(known.peer)
        }
        for peer in [one for one in met if met[one] is not present.get(one)]:
            gossip.part(peer)
            del met[peer]
        for peer, session in present.items():
            if peer not in met:
                gossip.meet(peer)
                met[peer] = session

    def _sync_records(self, mesh: bytes) -> None:
        gossip, now = self._gossips[mesh], trio.current_time()
        us = self._membership.record.current(self._candidates(), at_leisure=True)
        numbers = {us.peer: us.seq}
        for grant in self._ledger.members.of_mesh(mesh):
            member = self._membership.member(grant.peer)
            if member is None or self._ledger.why_void(grant) is not None:
                continue
            # The signature last: looking at one is work.
            if gossip.number(member.peer) == member.seq or self._is_signed(member):
                numbers[member.peer] = member.seq
        for peer in self._known[mesh] - numbers.keys():
            gossip.drop(peer)
        self._known[mesh] = set(numbers)
        for peer, number in numbers.items():
            gossip.put(peer, number, now)

    def _is_signed(self, member: Member) -> bool:
        if self._unsigned.get(member.peer) == member.seq:
            return False
        self._unsigned.pop(member.peer, None)
        if not member.is_signed():
            self._unsigned[member.peer] = member.seq
            return False
        return True

    def _records(self, mesh: bytes, peers: Iterable[PeerId]) -> Sequence[Mapping[str, Any]]:
        """Pages with the records of these members, each with its grant."""
        found: list[Record] = []
        for peer in peers:
            is_us = peer == self._ledger.identity.peer
            grant = self._ledger.grant(mesh) if is_us else self._ledger.members.shown(mesh, peer)
            word = self._membership.member(peer)
            if is_us:
                word = self._membership.record.current(self._candidates(), at_leisure=True)
            if grant is not None and word is not None:
                found.append((word, grant))
        return record_pages(found)

    def _save_when_due(self) -> None:
        if self._is_unsaved and trio.current_time() >= self._saved_at_s + SAVE_EVERY_S:
            self._is_unsaved, self._saved_at_s = False, trio.current_time()
            try:
                self._ledger.save_members()
            except MeshError as error:  # a full disk: what was heard counts all the same
                log.error("%s", error)
                self._is_unsaved = True

    # -- conversations ------------------------------------------------------------------------

    async def _talk(self, mesh: bytes, gossip: Gossip, talk: Talk) -> None:
        session = self._met.get(mesh, {}).get(talk.to)
        differed = False
        try:
            if session is None:
                raise TunnelError("its session has ended")
            with trio.fail_after(TALK_TIMEOUT_S):
                async with await session.open("roster") as stream:
                    differed = await self._hold_talk(MessageStream(stream), mesh, gossip, talk)
                    await stream.send_eof()
                    await MessageStream(stream).receive_or_end_untrusted()
        except (TunnelError, MeshError, trio.TooSlowError) as error:
            log.info("%s was not told of other members: %s", talk.to.short, error)
            gossip.over(talk, trio.current_time(), failed=True)
        else:
            gossip.over(talk, trio.current_time(), differed=differed)
        finally:
            self._woken.set()

    async def _hold_talk(
        self, messages: MessageStream, mesh: bytes, gossip: Gossip, talk: Talk
    ) -> bool:
        """The asker's side. Says whether a comparison found a difference."""
        await messages.send({"mesh": mesh, **gossip.opening(talk)})
        answer = await messages.receive_untrusted()
        if talk.news:
            wanted = gossip.wanted_untrusted(talk, answer, trio.current_time())
        else:
            narrowed = gossip.narrow_untrusted(answer)
            if narrowed is None:
                return False
            await messages.send(narrowed)
            answer = await messages.receive_untrusted()
            wanted, pages = gossip.compared_untrusted(talk, answer, trio.current_time())
            for _ in range(pages):
                await self._take_page(talk.to, await messages.receive_untrusted())
        for page in self._records(mesh, wanted):
            await messages.send(page)
        return not talk.news

    async def serve(self, stream: Stream) -> None:
        """The listener's side."""
        with patience(stream):
            messages = MessageStream(stream)
            first = await messages.receive_or_end_untrusted()
            if first is not None and "records" in first:  # told without being asked
                await self._take_page(stream.peer, first)
            elif first is not None:
                try:
                    await self._answer(stream.peer, messages, first)
                except BadFrame as error:
                    raise BadMessage(f"the peer gossips what is no message: {error}") from None
            for _ in range(MAX_PAGES):
                page = None if first is None else await messages.receive_or_end_untrusted()
                if page is None:
                    break
                await self._take_page(stream.peer, page)
            await stream.send_eof()

    async def _answer(
        self, peer: PeerId, messages: MessageStream, first: Mapping[str, Any]
    ) -> None:
        mesh = next((one for one in self._gossips if one == first.get("mesh")), None)
        if mesh is None or mesh not in self._membership.shown_by(peer):
            raise BadMessage("the peer gossips of a mesh that it does not share")
        gossip = self._gossips[mesh]
        answer = gossip.hear_untrusted(peer, first, trio.current_time())
        await messages.send(answer)
        if not answer.get("cells"):
            return
        second = await messages.receive_untrusted()
        wanted, newer = gossip.compare_untrusted(peer, second, trio.current_time())
        pages = self._records(mesh, newer)
        await messages.send({"want": pack_keys(wanted), "pages": len(pages)})
        for page in pages:
            await messages.send(page)

    # -- what is heard ------------------------------------------------------------------------

    async def _take_page(self, teller: PeerId, page: Mapping[str, Any]) -> None:
        async with self._membership.hearing.of(teller):
            self._take(teller, parse_records_untrusted(page, self._ledger.now()))

    def _take(self, teller: PeerId, records: list[Record]) -> None:
        shared = self._membership.shown_by(teller)
        now, heard = trio.current_time(), set()
        for member, grant in records:
            gossip = self._gossips.get(grant.mesh)
            if grant.mesh not in shared:
                continue
            try:
                became = self._ledger.hear_of(member, grant)
            except GrantError as error:
                log.info("%s tells of %s: %s", teller.short, member.peer.short, error)
                became = Heard.REFUSED
            heard.add(became)
            if gossip is None:
                continue
            if became in (Heard.NEWS, Heard.SAME):
                gossip.put(member.peer, member.seq, now, teller)
                self._known[grant.mesh].add(member.peer)
            elif became is Heard.REFUSED:
                gossip.refuse(member.peer, member.seq, now)
        self._is_unsaved = self._is_unsaved or bool(heard & {Heard.NEWS, Heard.SAME})
        self._save_when_due()
        if Heard.NEWS in heard:
            self._membership.notify()
        self._woken.set()
