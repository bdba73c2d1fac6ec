"""Grants that run out are signed anew while members are connected: the `renew` service.

A member asks whoever issued its grant, or the mesh's founder, once less than half of the grant's
time is left, once its issuer could give a longer one, and once a grant that its own hangs on was
revoked. Role, right to invite and `since` stay what they were.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from discovery.grants import (
    Grant,
    GrantError,
    encode_grant,
    parse_grant_untrusted,
    renewal_due,
)
from meshnode.errors import BadMessage, MeshError
from meshnode.ledger import WORTH_RENEWING_S
from meshnode.membership import HELLO_TIMEOUT_S, Membership, patience
from meshnode.messages import MessageStream
from tunnels import PeerId, Session, Stream, TunnelError

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 60.0
ASK_AGAIN_S = 3600.0  # after a refusal by the same member


class Renewal:
    """I have this node's grants renewed, and renew those of others."""

    def __init__(
        self, membership: Membership, reintroduce: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """reintroduce(mesh): shows our new grant to the members connected."""
        self._membership = membership
        self._ledger = membership.ledger
        self._reintroduce = reintroduce
        self._refused: dict[tuple[bytes, PeerId], tuple[Grant, float]] = {}
        self._own_is_news = False

    async def run(self) -> None:
        while True:
            changed = self._membership.changed
            await self._renew_all()
            with trio.move_on_after(CHECK_INTERVAL_S):
                await changed.wait()

    def renewers(self) -> set[PeerId]:
        """Who may renew a grant of ours that needs it: they are to be kept in touch with."""
        peers = set()
        for mesh in self._ledger.meshes():
            own = self._ledger.grant(mesh)
            if own is None or mesh == self._ledger.own_mesh:
                continue
            if renewal_due(own, self._ledger.now()) or self._ledger.hangs_on_revoked(own):
                peers |= {own.issuer, own.chain()[0].peer}
        return peers

    async def _renew_all(self) -> None:
        self._own_is_news |= self._ledger.renew_own_mesh()
        if self._own_is_news:
            self._own_is_news = False
            await self._reintroduce(self._ledger.own_mesh)
        for mesh in self._ledger.meshes():
            if mesh == self._ledger.own_mesh:
                continue
            for session in self._who_may_renew(mesh):
                grant = self._ledger.grant(mesh)
                if grant is None or not self._wants(grant, session):
                    continue
                if await self._ask(session, grant):
                    await self._reintroduce(mesh)
                    break

    def _who_may_renew(self, mesh: bytes) -> list[Session]:
        """Sessions with our issuer and with the mesh's founder, the issuer first."""
        own = self._ledger.grant(mesh)
        found = []
        for known in self._membership.acquaintances():
            place = self._membership.shown_by(known.peer).get(mesh)
            if place is None or own is None or known.session is None or not known.introduced:
                continue
            if known.peer == own.issuer or place.depth == 1:
                found.append((known.peer != own.issuer, known.session))
        return [session for _, session in sorted(found, key=lambda one: one[0])]

    def _wants(self, grant: Grant, session: Session) -> bool:
        """Whether to ask this member now. Who has refused is asked again after a while, or once it
        has a newer grant itself."""
        theirs = self._membership.shown_by(session.peer).get(grant.mesh)
        if theirs is None:
            return False
        refusal = self._refused.get((grant.mesh, session.peer))
        if refusal is not None:
            shown_then, refused_at = refusal
            if shown_then == theirs and trio.current_time() - refused_at < ASK_AGAIN_S:
                return False
        if renewal_due(grant, self._ledger.now()) or self._ledger.hangs_on_revoked(grant):
            return True
        longer_s = theirs.expires_at - grant.expires_at
        return session.peer == grant.issuer and longer_s >= WORTH_RENEWING_S

    async def _ask(self, session: Session, grant: Grant) -> bool:
        """Whether a better grant is ours now, and on disk."""
        theirs = self._membership.shown_by(session.peer)[grant.mesh]
        try:
            with trio.fail_after(HELLO_TIMEOUT_S):
                async with await session.open("renew") as stream:
                    messages = MessageStream(stream)
                    await messages.send({"mesh": grant.mesh})
                    answer = await messages.receive_untrusted()
            data = answer.get("grant")
            if not isinstance(data, bytes):
                raise BadMessage(f"refused: {str(answer.get('refused'))[:200]!r}")
            renewed = parse_grant_untrusted(data)
            self._ledger.verify(renewed, self._ledger.identity.peer)
            if (renewed.mesh, renewed.role) != (grant.mesh, grant.role):
                raise BadMessage("it is a grant for something else")
        except (TunnelError, MeshError, GrantError, trio.TooSlowError) as error:
            log.info("%s does not renew our grant: %s", session.peer.short, error)
            self._refused[grant.mesh, session.peer] = (theirs, trio.current_time())
            return False
        self._ledger.keep_grant(renewed)
        return True

    async def serve(self, stream: Stream) -> None:
        with patience(stream):
            messages = MessageStream(stream)
            mesh = (await messages.receive_untrusted()).get("mesh")
            if not isinstance(mesh, bytes):
                raise BadMessage("the peer's request to renew has an unknown shape")
            self._own_is_news |= self._ledger.renew_own_mesh()  # ours first, or theirs is cut to it
            try:
                grant = self._membership.shown_by(stream.peer).get(mesh)
                if grant is None:
                    raise GrantError("this node is no member of that mesh: ask for an invite")
                renewed = self._ledger.renew(grant)
            except GrantError as refusal:
                await messages.send({"refused": str(refusal)})
            else:
                await messages.send({"grant": encode_grant(renewed)})
            await stream.send_eof()
