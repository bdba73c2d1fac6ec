"""Reply codes, both sides: of the joiner that reached nobody, and of the node that invited it."""

from __future__ import annotations

import secrets

import trio

from discovery.invites import Invite, secret_hash
from discovery.reply import NONCE_BYTES, BadReply, Reply, check, encode, parse_untrusted, probe_key
from discovery.token import Token
from meshnode.errors import AccessError, NetworkError
from meshnode.events import Emit, Event, Kind
from meshnode.ledger import Ledger
from tunnels import Candidate, Endpoint, TunnelError
from tunnels.handshake import Role
from tunnels.meeting import Meeting, Nats, nats_told_by

ACCEPT_TIMEOUT_S = 9.0  # from a pasted code to a way, or none: node.sock waits for 10 s
_KIND_ORDER = {"mapped": 0, "reflexive": 1, "given": 2, "host": 3}


class Replies:
    """I make codes where our own datagrams find nobody, and follow those that others made.

    wait_s: how long a joiner waits for its code to be carried to the other side; 0: not at all.
    """

    wait_s = 0.0

    def __init__(self, endpoint: Endpoint, ledger: Ledger, emit: Emit) -> None:
        self._endpoint = endpoint
        self._ledger = ledger
        self._emit = emit

    async def call_back(self, token: Token) -> Candidate:
        """The joiner's side: shows a code, and returns where the inviter is heard once somebody has
        given it the code. Raises TunnelError."""
        nonce, hashed = secrets.token_bytes(NONCE_BYTES), secret_hash(token.secret)
        nats = self._endpoint.nats()
        reply = Reply(token.id, nonce, self._our_addresses(), nats.v4, nats.v6)
        line = f"mesh accept {encode(reply, hashed)}"
        text = (
            "nobody answers at the invite's addresses. If both machines are behind routers, run "
            f"this on the one that made the invite (its code is good while this one waits):\n{line}"
        )
        self._emit(Event(Kind.REPLY, text, {"line": line}))
        where = tuple((one.host, one.port) for one in token.candidates if one.transport == "quic")
        host, port = await self._endpoint.punch(
            Meeting(
                probe_key(hashed, nonce),
                Role.DIALLER,
                where,
                mine=nats,
                theirs=nats_told_by(token.candidates),
                patience_s=self.wait_s,
            )
        )
        return Candidate("quic", host, port, "reflexive")

    async def accept(self, text: str) -> str:
        """The inviter's side: opens the way to whoever made the code, who then joins over it. Where
        it is heard, in words. Raises AccessError, NetworkError."""
        try:
            reply = parse_untrusted(text)
        except BadReply as error:
            raise AccessError(str(error)) from None
        invite = self._invite(reply)
        meeting = Meeting(
            probe_key(invite.secret_hash, reply.nonce),
            Role.LISTENER,
            reply.addresses,
            mine=self._endpoint.nats(),
            theirs=Nats(reply.nat_v4, reply.nat_v6),
        )
        try:
            with trio.fail_after(ACCEPT_TIMEOUT_S):
                host, port = await self._endpoint.punch(meeting)
        except (TunnelError, trio.TooSlowError) as error:
            why = str(error) or "nobody was heard"
            raise NetworkError(
                f"no way to the other machine was found: {why}. Is it still waiting? If both "
                "routers give each connection another port, a relay is needed (docs/nat.md)"
            ) from None
        return str(Candidate("quic", host, port))

    def _our_addresses(self) -> tuple[tuple[str, int], ...]:
        ours = [one for one in self._endpoint.meeting_places() if one.transport == "quic"]
        ours.sort(key=lambda one: _KIND_ORDER.get(one.kind, len(_KIND_ORDER)))
        return tuple((one.host, one.port) for one in ours)

    def _invite(self, reply: Reply) -> Invite:
        invite = self._ledger.invites.get(reply.invite)
        if invite is None:
            raise AccessError(
                "this node did not make that invite: run `mesh accept` on the machine that printed "
                "the invite's token"
            )
        if not check(reply, invite.secret_hash):
            raise AccessError("the reply code was not made with this invite's token: copy it again")
        if invite.withdrawn or invite.expires_at <= self._ledger.now():
            raise AccessError("the invite is over: make a new one (`mesh invite`) and join by that")
        return invite
