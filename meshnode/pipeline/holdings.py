"""What the machines of a plan hold of a model, asked once for each plan."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

import trio

from meshnode.models.pull.source import RangeSource
from meshnode.models.spans import Span, joined
from meshnode.models.store.slice import Slice
from meshnode.pipeline.stock import Stock, names_within
from tunnels import PeerId

ASK_S = 3.0
"""Who does not say it by then counts as holding nothing."""

AskHolder = Callable[[PeerId, str], Awaitable[RangeSource | None]]
"""What a member holds of the model of that identity; None where that is nothing, or not known."""


async def ask_holdings(
    ask: AskHolder, identity: str, peers: Mapping[str, PeerId]
) -> dict[str, tuple[Span, ...]]:
    """By node, of those that say in time that they hold something."""
    held: dict[str, tuple[Span, ...]] = {}

    async def ask_one(node: str, peer: PeerId) -> None:
        source = await ask(peer, identity)
        if source is not None and source.holds:
            held[node] = joined(source.holds)

    with trio.move_on_after(ASK_S):
        async with trio.open_nursery() as nursery:
            for node, peer in peers.items():
                nursery.start_soon(ask_one, node, peer)
    return held


def stock_of(
    part: Slice, home: str, held: Mapping[str, Sequence[Span]], bare: Sequence[str] = ()
) -> Stock:
    """Of a model that is a slice on this machine, `home`. `held`: by other node."""
    names = {node: names_within(part.facts, spans) for node, spans in held.items()}
    return Stock(part.facts, names | {home: part.document.held}, home, bare)
