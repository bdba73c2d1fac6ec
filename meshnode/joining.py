"""A stranger becomes a member: the `join` service, open to anyone who has proven a key.

The joiner shows a token's id and secret, the inviter burns a use and answers with a signed grant.
The secret travels inside the tunnel to the inviter's pinned key, nowhere else.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import trio

from discovery.grants import (
    Grant,
    GrantError,
    Role,
    check_may_grant,
    encode_grant,
    parse_grant_untrusted,
)
from discovery.invites import InviteRefused
from discovery.token import ID_BYTES, SECRET_BYTES, Secret, Token, encode
from meshnode.crash_points import reached
from meshnode.discretion import fit_for
from meshnode.errors import AccessError, BadMessage
from meshnode.introduction import MAX_CANDIDATES
from meshnode.ledger import Ledger
from meshnode.membership import HELLO_TIMEOUT_S, patience
from meshnode.messages import MessageStream
from tunnels import Candidate, PeerId, Session, Stream
from tunnels.frames import clip_reason


class Joining:
    """I make invites and honour them, and use those of others."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def invite(
        self,
        candidates: Iterable[Candidate],
        *,
        role: Role,
        lifetime_s: int,
        uses: int,
        mesh: bytes | None = None,
    ) -> Token:
        """A new token for `mesh` (default: the one we founded); only its secret's hash is kept.

        `AccessError` where we may not invite into it, or not into this role; `ValueError` for a
        lifetime or uses that no token can carry; the book is as before then.
        """
        ledger = self._ledger
        own = ledger.grant(ledger.own_mesh if mesh is None else mesh)
        if own is None:
            raise AccessError("this node is no member of that mesh: join it first")
        try:
            check_may_grant(own, role)
        except GrantError as error:
            raise AccessError(f"this node may not invite there: {error}") from None
        now = ledger.now()
        token = Token(
            mesh=own.mesh,
            inviter=ledger.identity.peer,
            id=secrets.token_bytes(ID_BYTES),
            secret=Secret(secrets.token_bytes(SECRET_BYTES)),
            role=role,
            expires_at=int(now) + lifetime_s,
            uses=uses,
            candidates=fit_for(ledger, candidates, (own.mesh,))[:MAX_CANDIDATES],
        )
        encode(token)
        ledger.invites.forget_old(now)
        ledger.invites.create(
            token.id,
            token.secret,
            mesh=own.mesh,
            role=role,
            created_at=max(int(now), ledger.revocations.newest_removal(own) + 1),
            expires_at=token.expires_at,
            uses=token.uses,
        )
        ledger.save_invites()
        return token

    async def serve(self, stream: Stream) -> None:
        """The inviter's side."""
        with patience(stream):
            messages = MessageStream(stream)
            request = await messages.receive_untrusted()
            try:
                grant = self._redeem(stream.peer, request)
            except (InviteRefused, GrantError) as refusal:
                await messages.send({"refused": str(refusal)})
            else:
                reached("join.saved")
                await messages.send({"grant": encode_grant(grant)})
            await stream.send_eof()

    def _redeem(self, peer: PeerId, request: Mapping[str, Any]) -> Grant:
        invite_id, data = request.get("id"), request.get("secret")
        if not (isinstance(invite_id, bytes) and isinstance(data, bytes)):
            raise BadMessage("the peer's request to join has an unknown shape")
        if len(data) != SECRET_BYTES:
            raise BadMessage("the peer's request to join has an unknown shape")
        ledger, secret = self._ledger, Secret(data)
        invite = ledger.invites.check(invite_id, secret)
        own = ledger.grant(invite.mesh)
        if own is None:
            raise GrantError("the inviter is no member of the mesh any more: ask another member")
        removed_at = ledger.revocations.removed_at(peer, own)
        redemption = ledger.invites.redeem(
            invite_id, secret, peer, ledger.now(), removed_at=removed_at
        )
        grant = ledger.issue_grant(
            redemption.mesh, peer, redemption.role, chosen_at=invite.created_at
        )
        reached("join.burned")
        ledger.save_invites()  # burned for good before the grant leaves
        return grant

    async def redeem(self, session: Session, token: Token) -> None:
        """The joiner's side: shows the token to its inviter and keeps the grant. Raises
        `AccessError`."""
        with trio.fail_after(HELLO_TIMEOUT_S):
            async with await session.open("join") as stream:
                messages = MessageStream(stream)
                await messages.send({"id": token.id, "secret": token.secret.reveal()})
                reached("join.asked")
                answer = await messages.receive_untrusted()
        if isinstance(answer.get("refused"), str):
            raise AccessError(f"the invite was refused: {clip_reason(answer['refused'])}")
        data = answer.get("grant")
        if not isinstance(data, bytes):
            raise BadMessage("the inviter's answer has an unknown shape")
        try:
            grant = parse_grant_untrusted(data)
            if grant.mesh != token.mesh:
                raise GrantError("it is for another mesh than the token's")
            self._ledger.verify(grant, self._ledger.identity.peer)
        except GrantError as error:
            raise AccessError(f"the inviter's grant does not hold: {error}") from None
        reached("join.granted")
        self._ledger.keep_grant(grant)
