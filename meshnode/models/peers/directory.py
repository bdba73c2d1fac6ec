"""Which members hold a model that a user names: the asking end of the `store` service's lists."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import trio

from meshnode.errors import MeshError, NetworkError, NoSuchModel
from meshnode.messages import MessageStream
from meshnode.models.facts import ModelFacts
from meshnode.models.peers.listing import (
    DIGESTS_BYTES,
    LISTING_BYTES,
    Choice,
    Listed,
    Told,
    choose,
    parse_digests_untrusted,
    parse_listing_untrusted,
    proven,
)
from meshnode.models.peers.protocol import DigestsRequest, ModelsRequest
from meshnode.models.peers.service import STORE_SERVICE
from tunnels import PeerId, Session, TunnelError

ANSWER_WITHIN_S = 15.0
"""The first list of a machine with many models takes a while: their headers are read for it."""
LISTINGS_WITHIN_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """What a member says that it has."""

    member: str
    peer: PeerId
    models: tuple[Listed, ...]


class Directory:
    """I find models by name at the members that are connected."""

    def __init__(
        self,
        sessions: Callable[[], Sequence[Session]],
        name_of: Callable[[Session], str],
        own: Callable[[], Sequence[Listed]] = list,
        own_name: str = "",
    ) -> None:
        """own: what is on this node's own disk; blocks for it."""
        self._sessions = sessions
        self._name_of = name_of
        self._own = own
        self._own_name = own_name

    async def find(self, text: str, *, here_too: bool = False) -> Choice:
        """The model that a name or an identity means: at members, or where none of them has it,
        here; or at any of both. Raises `NoSuchModel`, `AmbiguousModel`, or `NetworkError` where
        there is nobody to ask."""
        own = [Told(self._own_name, one) for one in await trio.to_thread.run_sync(self._own)]
        sessions = self._heard()
        listings, silent = await self._ask_all(sessions)
        told = [Told(one.member, model) for one in listings for model in one.models]
        if here_too:
            return choose(text, [*told, *own], silent)
        try:
            return choose(text, told, silent)
        except NoSuchModel:
            with suppress(NoSuchModel):
                return choose(text, own)
            if sessions:
                raise
        raise NetworkError(
            "no member is connected that could have the model: `mesh peers` shows who is, and a "
            "node joins others with `mesh worker join=…`"
        )

    async def listings(self) -> tuple[list[Listing], list[str]]:
        """What each member has, and the names of those that did not say so soon."""
        return await self._ask_all(self._heard(), LISTINGS_WITHIN_S)

    def _heard(self) -> list[Session]:
        return [session for session in self._sessions() if not session.suspected]

    async def _ask_all(
        self, sessions: Sequence[Session], within_s: float = math.inf
    ) -> tuple[list[Listing], list[str]]:
        listings: dict[PeerId, Listing] = {}

        async def ask(session: Session) -> None:
            name = self._name_of(session)
            try:
                answer = await _ask(session, ModelsRequest().to_message(), LISTING_BYTES)
                models = parse_listing_untrusted(answer)
            except (TunnelError, MeshError, trio.TooSlowError) as error:
                log.info("%s does not say which models it has: %s", name, error)
            else:
                listings[session.peer] = Listing(name, session.peer, models)

        with trio.move_on_after(within_s):
            async with trio.open_nursery() as nursery:
                for session in sessions:
                    nursery.start_soon(ask, session)
        silent = [self._name_of(one) for one in sessions if one.peer not in listings]
        return sorted(listings.values(), key=lambda one: one.member), sorted(silent)

    async def digests(self, root: str, facts: ModelFacts) -> Mapping[str, bytes] | None:
        """Of every tensor of the model of that root, whose header these facts are; None where
        nobody gives digests that make up the root."""
        for session in self._sessions():
            if session.suspected:
                continue
            try:
                answer = await _ask(session, DigestsRequest(root).to_message(), DIGESTS_BYTES)
                told = parse_digests_untrusted(answer)
            except (TunnelError, MeshError, trio.TooSlowError) as error:
                log.info("%s gives no digests: %s", self._name_of(session), error)
                continue
            found = await trio.to_thread.run_sync(proven, facts, root, told)
            if found is not None:
                return found
            if told:
                log.warning("%s gives digests of another model", self._name_of(session))
        return None


async def _ask(
    session: Session, question: Mapping[str, Any], limit_bytes: int
) -> Mapping[str, Any]:
    with trio.fail_after(ANSWER_WITHIN_S):
        async with await session.open(STORE_SERVICE) as stream:
            messages = MessageStream(stream)
            await messages.send(question)
            return await messages.receive_untrusted(limit_bytes)
