"""What this node pulls because another one orders it: the obeying end of the `pull` service.

An order lasts as long as its asker stays on the line: where that leaves, or is lost for longer than
a stream outlives an outage, the pull ends, and what came stays. Who comes back goes on from there.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from meshnode.config import PullSource
from meshnode.errors import AccessError, BadMessage, MeshError, NetworkError, out_of_files
from meshnode.events import Emit, Event, Kind
from meshnode.local_paths import without_paths
from meshnode.messages import MessageStream
from meshnode.models.facts import shown_name
from meshnode.nurseries import bare_nursery
from meshnode.pipeline.commission import (
    Commission,
    Failed,
    Held,
    News,
    Progressed,
    parse_commission_untrusted,
)
from meshnode.pipeline.errand import KIND_WORDS
from meshnode.pipeline.pulling import Puller, Wish
from meshnode.pipeline.quota import Quota
from tunnels import Endpoint, PeerId, Stream, TunnelError
from tunnels.allowance import Rate
from tunnels.gate import ServiceLimits

PULL_SERVICE = "pull"
ASK_WITHIN_S = 30.0
TAKE_WITHIN_S = 60.0
"""For the asker to take a word of ours; one that takes none any more has left."""
TELL_EVERY_S = 0.5
ALIVE_EVERY_S = 10.0  # a word of a pull that is no further: it waits for another, or for a source
# A person gives orders by hand, or a program for a dozen models; each may last for hours.
ORDERS = ServiceLimits(
    peer_streams=4, streams=8, peer_rate=Rate(0.1, burst=8), rate=Rate(0.5, burst=32)
)

log = logging.getLogger(__name__)


class OrderDesk:
    """I carry out orders to pull, as far as this node's operator allows."""

    def __init__(
        self,
        name: str,
        puller: Puller,
        allowed: frozenset[PullSource],
        kind_of: Callable[[str], PullSource],
        quota: Quota,
        name_of: Callable[[PeerId], str],
        emit: Emit,
        folders: Sequence[Path] = (),
    ) -> None:
        """name: this node's. allowed: nothing where this node does not lend. kind_of: which kind of
        source a reference names. folders: this node's own, whose names are not told to others."""
        self._name = name
        self._puller = puller
        self._allowed = allowed
        self._kind_of = kind_of
        self._quota = quota
        self._name_of = name_of
        self._emit = emit
        self._folders = folders

    def offer(self, endpoint: Endpoint) -> None:
        endpoint.serve(PULL_SERVICE, self.serve, ORDERS)

    async def serve(self, stream: Stream) -> None:
        """One order from its first word to its end."""
        messages = MessageStream(stream)
        try:
            with trio.fail_after(ASK_WITHIN_S):
                order = parse_commission_untrusted(await messages.receive_untrusted())
            outcome = await self._while_asked(stream, messages, order)
            if outcome is not None:
                await _say(messages, outcome)
                await stream.send_eof()
        except BadMessage as error:
            log.info("an order of %s was not heard out: %s", stream.peer.short, error)
            stream.reset(str(error))
        except (NetworkError, TunnelError) as error:
            log.info("an order of %s ended: %s", stream.peer.short, error)
        except trio.TooSlowError:
            stream.reset("the conversation stood still")

    async def _while_asked(
        self, stream: Stream, messages: MessageStream, order: Commission
    ) -> News | None:
        """What came of it; None where the asker has left."""
        outcome: News | None = None
        async with bare_nursery() as nursery:
            nursery.start_soon(_until_left, stream, nursery.cancel_scope)
            async with _telling(messages) as tell:
                outcome = await self._carry_out(stream.peer, order, tell)
            nursery.cancel_scope.cancel()
        if outcome is None:
            log.info("%s has left, so its order to pull ends", stream.peer.short)
        return outcome

    async def _carry_out(
        self, peer: PeerId, order: Commission, tell: Callable[[int, int], None]
    ) -> Held | Failed:
        asker = self._name_of(peer)
        try:
            held = await self._pull(peer, asker, order, tell)
        except (MeshError, OSError) as caught:
            error = out_of_files(caught) or caught
            if isinstance(error, OSError):
                raise
            log.info("the order of %s to pull %s failed: %s", asker, order.source, error)
            return Failed(without_paths(str(error), self._folders), error.exit_code)
        self._say(asker, f"pulled {shown_name(held.name)}", order)
        return held

    async def _pull(
        self, peer: PeerId, asker: str, order: Commission, tell: Callable[[int, int], None]
    ) -> Held:
        kind = self._kind_of(order.source)
        if kind not in self._allowed:
            raise AccessError(
                f"{self._name} pulls nothing {KIND_WORDS[kind]} for others: run `mesh pull` there, "
                f"or start its node with --allow-pull {kind.value} (`mesh worker`, or `mesh serve "
                "--lend`)"
            )
        self._say(asker, f"pulls {shown_name(order.source)}", order)
        async with self._quota.place(peer) as bounds:
            pulled = await self._puller.pull(Wish(order.source, order.layers), tell, bounds)
        return Held(
            name=pulled.name,
            id=pulled.id,
            pulled_bytes=pulled.pulled_bytes,
            held_bytes=pulled.held_bytes,
            weight_bytes=pulled.weight_bytes,
            complete=pulled.complete,
            proof=pulled.proof.value,
        )

    def _say(self, asker: str, text: str, order: Commission) -> None:
        data = {"asker": asker, "source": order.source, "layers": order.layers}
        self._emit(Event(Kind.MODELS, f"{text} for {asker}", data))


async def _until_left(stream: Stream, scope: trio.CancelScope) -> None:
    """Ends the order where its asker does. Raises `BadMessage` where that says anything more."""
    if await stream.receive_some(1):
        raise BadMessage("the peer says more than its order to pull")
    scope.cancel()


@asynccontextmanager
async def _telling(messages: MessageStream) -> AsyncIterator[Callable[[int, int], None]]:
    """Gives a function for how far it is. The newest word goes to the asker now and then, and none
    is cut short by the end."""
    progress, over = Progressed(0, 0), trio.Event()

    def tell(done_bytes: int, total_bytes: int) -> None:
        nonlocal progress
        progress = Progressed(done_bytes, total_bytes)

    async def pass_on() -> None:
        told, told_at = Progressed(0, 0), trio.current_time()
        while not over.is_set():
            with trio.move_on_after(TELL_EVERY_S):
                await over.wait()
                return
            if progress != told or trio.current_time() - told_at >= ALIVE_EVERY_S:
                told, told_at = progress, trio.current_time()
                await _say(messages, told)

    async with bare_nursery() as nursery:
        nursery.start_soon(pass_on)
        try:
            yield tell
        finally:
            over.set()


async def _say(messages: MessageStream, news: News) -> None:
    with trio.fail_after(TAKE_WITHIN_S):
        await messages.send(news.to_message())
