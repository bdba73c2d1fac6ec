"""Members show each other their grants: the `hello` service, open to anyone who has proven a key.

Both sides show the grants of the meshes they share, their names and addresses, and tell what they
know to be revoked in those meshes, before the other's grant gives any right:

1. dialler: its grants, in meshes that the listener has proven before, or that a token names
2. listener: its grants in the meshes that the dialler has just proven, and what is revoked there;
   also what speaks against the dialler's own grants
3. dialler, once that is taken and the listener's grants hold: what it knows to be revoked there
4. listener, once that is taken and the dialler's grants still hold: yes

A side opens services at the other after the other has said that it checked (3 and 4). The same
conversation on a session that stands replaces what was shown on it, mesh by mesh.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import trio

from discovery.grants import encode_grant
from discovery.revocations import Revocation
from discovery.roster import Member
from meshnode.discretion import fit_for
from meshnode.errors import AccessError, BadMessage
from meshnode.introduction import (
    MAX_HELLO_GRANTS,
    MAX_PAGES,
    member_message,
    parse_grants_untrusted,
    parse_member_untrusted,
    parse_revocation_page_untrusted,
    revocation_pages,
)
from meshnode.membership import HELLO_TIMEOUT_S, Membership, patience
from meshnode.messages import MessageStream
from tunnels import Candidate, PeerId, Session, Stream


class Introductions:
    """I introduce this node to its peers, and hear who they are."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._ledger = membership.ledger

    async def introduce(
        self, session: Session, candidates: Iterable[Candidate], meshes: Iterable[bytes] = ()
    ) -> None:
        """The dialler's side. Shows our grants in `meshes`, such as a token's, and in those the
        peer has proven before. Raises `AccessError` when we share no mesh."""
        asked = {*meshes, *self._ledger.members.proven(session.peer)}
        shown = [mesh for mesh in sorted(asked) if self._ledger.grant(mesh)]
        with trio.fail_after(HELLO_TIMEOUT_S):
            async with await session.open("hello") as stream:
                messages = MessageStream(stream)
                await messages.send(self._hello(candidates, shown))
                answer = await messages.receive_untrusted()
                grants, word = parse_grants_untrusted(answer), self._word(session, answer)
                heard = await self.hear(session.peer, messages, shown)
                good = self._membership.verified(session.peer, grants)
                if not good:
                    raise AccessError(self._refusal(session, shown))
                known = self._membership.acquaint(session, word, good)
                known.told |= heard
                known.told |= await self._send_pages(messages, good)
                if await messages.receive_or_end_untrusted() is None:
                    raise AccessError(
                        f"the node {session.peer.short} does not take this node's grant: ask for "
                        "a new invite (`mesh invite`)"
                    )
        self._membership.now_introduced(known)

    async def serve(self, stream: Stream, candidates: Iterable[Candidate]) -> None:
        """The listener's side: only grants of meshes the peer has proven are shown."""
        # The session that brought this stream, whatever stands when the answers come.
        session = self._membership.present_session(stream.peer)
        with patience(stream):
            messages = MessageStream(stream)
            hello = await messages.receive_untrusted()
            grants = parse_grants_untrusted(hello)
            word = parse_member_untrusted(stream.peer, hello, self._ledger.now())
            shared = self._membership.verified(stream.peer, grants)
            against = self._membership.held_against(stream.peer, grants)
            await messages.send(self._hello(candidates, shared))
            told = await self._send_pages(messages, shared, against)
            if shared:
                told |= await self.hear(stream.peer, messages, shared)
                good = self._membership.verified(stream.peer, grants)
                if good and self._membership.present_session(stream.peer) is session:
                    known = self._membership.acquaint(session, word, good)
                    known.told |= told
                    await messages.send({"ok": True})
                    self._membership.now_introduced(known)
            await stream.send_eof()

    async def hear(
        self, peer: PeerId, messages: MessageStream, meshes: Collection[bytes]
    ) -> set[bytes]:
        """Takes the peer's pages of revocations, those of `meshes`; their digests. Raises
        `BadMessage`."""
        heard: set[bytes] = set()
        for _ in range(MAX_PAGES):
            message = await messages.receive_untrusted()
            async with self._membership.hearing.of(peer):
                revocations, more = parse_revocation_page_untrusted(message)
                ours = [one for one in revocations if one.mesh in meshes]
                self._membership.take(ours)
            heard.update(one.digest for one in ours)
            if not more:
                return heard
        raise BadMessage("the peer tells of too many revocations")

    async def _send_pages(
        self,
        messages: MessageStream,
        meshes: Iterable[bytes],
        besides: Iterable[Revocation] = (),
    ) -> set[bytes]:
        said = [one for mesh in meshes for one in self._ledger.revocations.of_mesh(mesh)]
        said += [one for one in besides if one not in said]
        for page in revocation_pages(said):
            await messages.send(page)
        return {one.digest for one in said}

    def _hello(self, candidates: Iterable[Candidate], meshes: Collection[bytes]) -> dict[str, Any]:
        own = [self._ledger.grant(mesh) for mesh in sorted(meshes)[:MAX_HELLO_GRANTS]]
        word = self._membership.record.current(fit_for(self._ledger, candidates, meshes))
        grants = [encode_grant(grant) for grant in own if grant is not None]
        return member_message(word) | {"grants": grants}

    def _word(self, session: Session, message: Mapping[str, Any]) -> Member:
        return parse_member_untrusted(session.peer, message, self._ledger.now())

    def _refusal(self, session: Session, shown: Iterable[bytes]) -> str:
        if any(self._ledger.grant(mesh) is None for mesh in shown):
            return (
                f"the node {session.peer.short} says that this node was removed from the mesh, or "
                "whoever invited it was: ask for a new invite (`mesh invite`)"
            )
        return (
            f"the node {session.peer.short} knows no mesh that this node belongs to: ask it for "
            "an invite (`mesh invite`)"
        )
