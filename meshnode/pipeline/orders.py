"""Pulls on other nodes, because this node's user wants them there: the asking end of `pull`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from meshnode.errors import MeshError, NetworkError
from meshnode.messages import MessageStream, PeerGone
from meshnode.models.fetching import FROM_MEMBERS, OnProgress
from meshnode.models.peers.directory import Directory
from meshnode.models.pull.reference import MeshReference, parse_reference
from meshnode.pipeline.commission import (
    Commission,
    Failed,
    Held,
    Progressed,
    check_layers_text,
    check_no_secrets,
    parse_news_untrusted,
)
from meshnode.pipeline.order_desk import PULL_SERVICE
from tunnels import PeerId, Session, StreamRefused, TunnelError

SEND_WITHIN_S = 30.0
SILENCE_S = 150.0
"""For the other node's next word; it says one every ten seconds, and a stream outlives an outage of
two minutes."""

Reach = Callable[[PeerId], Awaitable[Session]]
"""The session to a member, which is dialled where there is none. Raises `MeshError`."""


class OrderRefused(MeshError):
    """The other node did not pull; its sentence, and the exit code that it would end in there."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Target:
    """A node, by its name and its id."""

    node: str
    peer: str


class Orders:
    """I have other nodes pull."""

    def __init__(
        self,
        named: Callable[[str], PeerId],
        name_of: Callable[[PeerId], str],
        reach: Reach,
        directory: Directory,
    ) -> None:
        """named: who is meant by a user's word, which raises `UsageError` where that is nobody
        else."""
        self._named = named
        self._name_of = name_of
        self._reach = reach
        self._directory = directory

    def find(self, text: str) -> Target:
        """Who is meant, by a name or an id. Raises `UsageError`."""
        peer = self._named(text)
        return Target(self._name_of(peer), str(peer))

    async def pull(
        self, node: str, source: str, layers: str | None, on_progress: OnProgress
    ) -> Held:
        """What the node holds then. node: its name or its id. Goes on until it is cancelled, and so
        does the other node. Raises `MeshError`: what went wrong here, there, or on the way."""
        peer = self._named(node)
        name = self._name_of(peer)
        check_layers_text(layers)
        order = Commission(await self._travelling(source, name), layers)
        session = await self._reach(peer)
        try:
            async with await session.open(PULL_SERVICE) as stream:
                return await _follow(name, MessageStream(stream), order, on_progress)
        except StreamRefused as error:
            raise NetworkError(
                f"{name} takes no orders to pull: {error}; where its mesh is older than this one, "
                "update it, or run `mesh pull` there"
            ) from None
        except trio.TooSlowError:
            raise NetworkError(
                f"{name} has said nothing for {SILENCE_S:g} s, so it is not waited for any more: "
                "what came there by now stays; ask again to go on"
            ) from None
        except (TunnelError, PeerGone) as error:
            raise NetworkError(
                f"the order to {name} broke off: {error}; what came there by now stays, and the "
                "same command goes on from there"
            ) from None

    async def _travelling(self, source: str, name: str) -> str:
        """The source as the other node is to read it: a model of members by its identity, so that
        both mean the same."""
        reference = parse_reference(source)
        if isinstance(reference, MeshReference):
            choice = await self._directory.find(reference.name, here_too=True)
            return f"{FROM_MEMBERS}{choice.identity}"
        return check_no_secrets(source, name)


async def _follow(
    name: str, messages: MessageStream, order: Commission, on_progress: OnProgress
) -> Held:
    with trio.fail_after(SEND_WITHIN_S):
        await messages.send(order.to_message())
    while True:
        with trio.fail_after(SILENCE_S):
            news = parse_news_untrusted(await messages.receive_untrusted())
        match news:
            case Progressed(done_bytes, total_bytes):
                if total_bytes:
                    on_progress(done_bytes, total_bytes)
            case Failed(reason, code):
                raise OrderRefused(f"{name}: {reason}", code)
            case Held():
                return news
