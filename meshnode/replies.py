"""Reply codes, both sides: of the joiner that reached nobody, and of the node that invited it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeVar

import trio

from discovery.invites import Invite, secret_hash
from discovery.reply import (
    NONCE_BYTES,
    BadReply,
    Reply,
    check,
    encode,
    ice_key,
    parse_untrusted,
    probe_key,
)
from discovery.token import Token
from meshnode.dialling import JOIN_TIMEOUT_S
from meshnode.errors import AccessError, NetworkError
from meshnode.events import Emit, Event, Kind
from meshnode.ledger import Ledger
from meshnode.nurseries import accompanied_by
from tunnels import Candidate, Endpoint, Session, TunnelError
from tunnels.handshake import Role
from tunnels.meeting import Meeting, Nats, nats_told_by
from tunnels.webrtc_transport import AT_OUR_TURN_SERVER, Waiting

ACCEPT_TIMEOUT_S = 9.0  # from a pasted code to a way, or none: node.sock waits for 10 s
_KIND_ORDER = {"mapped": 0, "reflexive": 1, "given": 2, "host": 3}

Result = TypeVar("Result")


class Replies:
    """I make codes where our own datagrams find nobody, and follow those that others made.

    wait_s: how long a joiner waits for its code to be carried to the other side; 0: not at all.
    """

    wait_s = 0.0

    def __init__(self, endpoint: Endpoint, ledger: Ledger, emit: Emit) -> None:
        self._endpoint = endpoint
        self._ledger = ledger
        self._emit = emit

    def may_help(self, unheard: Iterable[Candidate]) -> bool:
        """Whether to make a code, where nobody was heard at these."""
        at_turn = self._endpoint.webrtc is not None and self._endpoint.webrtc.has_turn
        return self.wait_s > 0 and any(one.transport == "quic" or at_turn for one in unheard)

    async def call_back(self, token: Token) -> Session:
        """The joiner's side: shows a code, and returns the session with the inviter once somebody
        has given it the code: over the link that stood first. Raises TunnelError."""
        nonce, hashed = secrets.token_bytes(NONCE_BYTES), secret_hash(token.secret)
        async with self._at_turn_server(token, ice_key(hashed, nonce)) as waiting:
            nats = self._endpoint.nats()
            places = () if waiting is None else (waiting.place,)
            reply = Reply(token.id, nonce, self._our_addresses(), nats.v4, nats.v6, places)
            self._show(f"mesh accept {encode(reply, hashed)}")
            ways = [lambda: self._call_by_punching(token, probe_key(hashed, nonce))]
            if waiting is not None:
                ways.append(lambda: self._call_at_turn_server(token, waiting))
            return await _first(ways)

    def _show(self, line: str) -> None:
        text = (
            "nobody answers at the invite's addresses. If both machines are behind routers, run "
            f"this on the one that made the invite (its code is good while this one waits):\n{line}"
        )
        self._emit(Event(Kind.REPLY, text, {"line": line}))

    async def _call_by_punching(self, token: Token, key: bytes) -> Session:
        where = tuple((one.host, one.port) for one in token.candidates if one.transport == "quic")
        host, port = await self._endpoint.punch(
            Meeting(
                key,
                Role.DIALLER,
                where,
                mine=self._endpoint.nats(),
                theirs=nats_told_by(token.candidates),
                patience_s=self.wait_s,
            )
        )
        return await self._connect(token, Candidate("quic", host, port, "reflexive"))

    @asynccontextmanager
    async def _at_turn_server(self, token: Token, key: bytes) -> AsyncIterator[Waiting | None]:
        """None without one, or where it does not answer."""
        webrtc = self._endpoint.webrtc
        async with AsyncExitStack() as stack:
            waiting = None
            if webrtc is not None and webrtc.has_turn:
                try:
                    waiting = await stack.enter_async_context(
                        webrtc.wait_at_turn(token.inviter, key)
                    )
                except TunnelError as error:
                    text = f"the reply code names no place at the TURN server: {error}"
                    self._emit(Event(Kind.WARNING, text))
            if waiting is None:
                yield None
                return
            known = [(one.host, one.port) for one in token.candidates if one.via is None]
            async with accompanied_by(lambda: waiting.let_in(known)):
                yield waiting

    async def _call_at_turn_server(self, token: Token, waiting: Waiting) -> Session:
        with trio.move_on_after(self.wait_s):
            await waiting.called()
            return await self._connect(token, AT_OUR_TURN_SERVER)
        raise TunnelError("nobody came to this node's TURN server")

    async def _connect(self, token: Token, heard_at: Candidate) -> Session:
        with trio.move_on_after(JOIN_TIMEOUT_S):
            return await self._endpoint.connect(token.inviter, [heard_at])
        raise TunnelError(
            f"the inviter {token.inviter.short} was heard, and no link stood in "
            f"{JOIN_TIMEOUT_S:.0f} s"
        )

    async def accept(self, text: str) -> str:
        """The inviter's side: opens the way to whoever made the code, who then joins over it. Where
        it is heard, in words. Raises AccessError, NetworkError."""
        try:
            reply = parse_untrusted(text)
        except BadReply as error:
            raise AccessError(str(error)) from None
        invite = self._invite(reply)
        ways = [lambda: self._answer_by_punching(reply, invite)]
        if reply.places:
            ways.append(lambda: self._answer_at_turn_server(reply, invite))
        try:
            with trio.fail_after(ACCEPT_TIMEOUT_S):
                return await _first(ways)
        except (TunnelError, trio.TooSlowError) as error:
            why = str(error) or "nobody was heard"
            raise NetworkError(
                f"no way to the other machine was found: {why}. Is it still waiting? If both "
                "routers give each connection another port, a relay is needed, or a TURN server "
                "that the other machine is started with (docs/nat.md)"
            ) from None

    async def _answer_by_punching(self, reply: Reply, invite: Invite) -> str:
        meeting = Meeting(
            probe_key(invite.secret_hash, reply.nonce),
            Role.LISTENER,
            reply.addresses,
            mine=self._endpoint.nats(),
            theirs=Nats(reply.nat_v4, reply.nat_v6),
        )
        host, port = await self._endpoint.punch(meeting)
        return str(Candidate("quic", host, port))

    async def _answer_at_turn_server(self, reply: Reply, invite: Invite) -> str:
        if self._endpoint.webrtc is None:
            raise TunnelError("this node makes no WebRTC links (--transport)")
        key = ice_key(invite.secret_hash, reply.nonce)
        link = await self._endpoint.webrtc.come_untrusted(reply.places, key)
        return f"{link.remote}, its TURN server"

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


async def _first(ways: Sequence[Callable[[], Awaitable[Result]]]) -> Result:
    """What the first way that leads somewhere leads to; the others are given up. Where none does,
    raises TunnelError with what became of each."""
    results: list[Result] = []
    failures: list[str] = []

    async def go(way: Callable[[], Awaitable[Result]]) -> None:
        try:
            results.append(await way())
            nursery.cancel_scope.cancel()
        except TunnelError as error:
            failures.append(str(error))

    async with trio.open_nursery() as nursery:
        for way in ways:
            nursery.start_soon(go, way)
    if not results:
        raise TunnelError("; ".join(failures))
    return results[0]
