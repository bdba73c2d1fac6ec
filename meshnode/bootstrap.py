"""Into a mesh by an invite: its inviter is found, the token redeemed, and both are introduced."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from discovery.grants import GRANTABLE, Role
from discovery.token import Token
from meshnode.crash_points import reached
from meshnode.dialling import FIRST_RETRY_S, JOIN_TIMEOUT_S, LAST_RETRY_S, Introduce
from meshnode.errors import AccessError, MeshError, NetworkError
from meshnode.events import Emit, Event, Kind
from meshnode.joining import Joining
from meshnode.membership import Membership
from meshnode.replies import Replies
from tunnels import DialFailed, Endpoint, Session, TunnelError

log = logging.getLogger(__name__)


class Bootstrap:
    """I bring this node into meshes that it knows no member of but the inviter."""

    def __init__(
        self,
        endpoint: Endpoint,
        membership: Membership,
        joining: Joining,
        replies: Replies,
        introduce: Introduce,
        emit: Emit,
    ) -> None:
        self._endpoint = endpoint
        self._membership = membership
        self._joining = joining
        self._replies = replies
        self._introduce = introduce
        self._emit = emit

    async def join_all(self, joins: Sequence[Token], later: trio.Nursery) -> None:
        """All at once. One dead invite does not hold up the others: it is a warning. Raises what
        `join` does when not one of them leads anywhere. later: for inviters that are away while
        this node is a member already; both may have been started again, and which one was first is
        nobody's fault."""
        failures: list[MeshError] = []

        async def join(token: Token) -> None:
            try:
                await self.join(token)
            except MeshError as error:
                if isinstance(error, NetworkError) and self._membership.role_in(token.mesh):
                    self._tell_going_on(token, error)
                    later.start_soon(self._join_later, token)
                else:
                    failures.append(error)

        async with trio.open_nursery() as nursery:
            for token in joins:
                nursery.start_soon(join, token)
        if failures and len(failures) == len(joins):
            raise failures[0]
        for failure in failures:
            self._emit(Event(Kind.WARNING, f"{failure}; going on with the other invites"))

    async def _join_later(self, token: Token) -> None:
        """After pauses that grow, until it leads somewhere or is refused."""
        pause_s = FIRST_RETRY_S
        while True:
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_RETRY_S)
            try:
                await self.join(token, by_code=False)
            except NetworkError as error:
                log.info("%s", error)
            except MeshError as error:
                self._emit(Event(Kind.WARNING, str(error)))
                return
            else:
                return

    async def join(self, token: Token, *, by_code: bool = True) -> None:
        """by_code: where packets vanish, a reply code may be shown. Raises `AccessError` (the
        invite) or `NetworkError` (the way to the inviter)."""
        if token.inviter == self._endpoint.peer:
            raise AccessError(
                "this invite was made by this very node: paste it on another machine, "
                "or start the second node with --home"
            )
        role = self._membership.role_in(token.mesh)
        expired = token.expires_at <= self._membership.ledger.now()
        if expired and role is None:
            raise AccessError("the invite has expired: ask for a new one (`mesh invite`)")
        has_more = role is not None and token.role in GRANTABLE[role]
        redeems = not has_more and not expired
        if role is not None and has_more and role is not token.role and not expired:
            self._tell_kept_role(token, role)
        try:
            session = await self._reach_inviter(token, by_code)
            with trio.fail_after(JOIN_TIMEOUT_S):
                if redeems:
                    await self._joining.redeem(session, token)
                await self._introduce(session, (token.mesh,))
                reached("join.introduced")
        except TunnelError as error:
            raise NetworkError(f"joining failed: {error}") from None
        except trio.TooSlowError:
            raise NetworkError(
                f"joining failed: the inviter {token.inviter.short} was reached but did not answer "
                f"in {JOIN_TIMEOUT_S:.0f} s; try again, or restart it"
            ) from None

    async def _reach_inviter(self, token: Token, by_code: bool) -> Session:
        """Raises `TunnelError`. Where packets vanish, a reply code may help (replies.py)."""
        try:
            with trio.fail_after(JOIN_TIMEOUT_S):
                return await self._endpoint.connect(token.inviter, token.candidates)
        except DialFailed as error:
            if not (by_code and self._replies.may_help(error.unheard)):
                raise
        return await self._replies.call_back(token)

    def _tell_going_on(self, token: Token, error: NetworkError) -> None:
        name = self._membership.mesh_name(token.mesh)
        text = f"{error}; this node is in {name} already: it goes on, and tries again"
        self._emit(Event(Kind.WARNING, text))

    def _tell_kept_role(self, token: Token, role: Role) -> None:
        name = self._membership.mesh_name(token.mesh)
        text = (
            f"this node stays {role.value} in {name}, which is more than the {token.role.value} of "
            "the invite: to become less, `mesh leave` first, then join again"
        )
        self._emit(Event(Kind.WARNING, text))
