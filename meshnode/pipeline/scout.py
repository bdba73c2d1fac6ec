"""The orchestrator's eyes: which machines there are for a deployment, and how fast they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import trio

from discovery.grants import LENDERS
from meshnode.config import Address
from meshnode.connections import Connections
from meshnode.engine.cache import Engine
from meshnode.engine.devices import Device
from meshnode.membership import Membership
from meshnode.models.facts import ModelFacts
from meshnode.models.store.slice import slice_of
from meshnode.pipeline.figures import Figures
from meshnode.pipeline.holdings import AskHolder, ask_holdings, stock_of
from meshnode.pipeline.plan import PlanNode
from meshnode.pipeline.ring import Partings
from meshnode.pipeline.speeds import Links
from meshnode.pipeline.stock import Stock
from meshnode.pipeline.survey import (
    LOCAL_NAME,
    Lender,
    find_fresh,
    find_lenders,
    links_between,
    local_node,
)
from tunnels import PeerId, Session


class Scout:
    """I find whom to plan with. me: this node; figures: None where nothing is measured; warn: tells
    the user, of a node."""

    def __init__(
        self,
        me: PeerId,
        engine: Engine,
        membership: Membership,
        connections: Connections,
        figures: Figures | None,
        ask_holder: AskHolder,
        warn: Callable[[str, str], None],
    ) -> None:
        self._me = me
        self._engine = engine
        self._membership = membership
        self._connections = connections
        self._figures = figures
        self._ask_holder = ask_holder
        self._warn = warn
        self._mismatched: set[PeerId] = set()

    @property
    def measures(self) -> bool:
        """Whether this machine's speed may be known some time."""
        return self._figures is not None

    def computing(self) -> AbstractContextManager[None]:
        """While it lasts, no device of this machine is measured."""
        return self._figures.computing() if self._figures else nullcontext()

    def sessions(self) -> list[Session]:
        """To members that lend and are heard."""
        return [
            session
            for session in self._connections.introduced()
            if self._membership.roles(session.peer) & LENDERS and not session.suspected
        ]

    async def lenders(
        self, sessions: Sequence[Session], bare_rpc: Sequence[Address], *, fresh: bool
    ) -> tuple[Lender, ...]:
        """Those that answer and run this node's engine. fresh: once all that is not known of their
        speed and this machine's has been measured, or some seconds later."""
        if fresh and self._figures:
            found = await find_fresh(sessions, bare_rpc, self._figures)
        else:
            found = await find_lenders(sessions, bare_rpc)
            if self._figures:
                self._figures.want()
        return tuple(lender for lender in found if self._has_our_engine(lender))

    def local(self, devices: Sequence[Device]) -> PlanNode:
        return local_node(devices, self._figures.speed) if self._figures else local_node(devices)

    def links(
        self, nodes: Sequence[PlanNode], lenders: Sequence[Lender], partings: Partings
    ) -> Links:
        """What is known of the ways between the nodes, of which the lenders are."""
        return links_between(nodes, lenders, self._me, self._figures, partings.apart)

    async def stock(self, facts: ModelFacts, lenders: Sequence[Lender]) -> Stock | None:
        """What this machine and the lenders hold of the model; None where it is no slice here."""
        part = await trio.to_thread.run_sync(slice_of, facts.path)
        if part is None:
            return None
        peers = {one.name: one.session.peer for one in lenders if one.session}
        held = await ask_holdings(self._ask_holder, part.identity.provisional, peers)
        return stock_of(part, LOCAL_NAME, held, [one.name for one in lenders if not one.session])

    def _has_our_engine(self, lender: Lender) -> bool:
        """Operation numbers differ between engines, so one that differs is left out, and told."""
        if lender.facts is None or lender.session is None:
            return True  # a bare rpc-server, whose protocol version was checked
        if lender.facts.engine_key == self._engine.key:
            self._mismatched.discard(lender.session.peer)
            return True
        if lender.session.peer not in self._mismatched:
            self._mismatched.add(lender.session.peer)
            text = (
                f"{lender.name} is left out: it runs engine {lender.facts.engine_key}, this node "
                f"{self._engine.key}; install the same mesh version on both, then run "
                "`mesh engine build` on each"
            )
            self._warn(text, lender.name)
        return False
