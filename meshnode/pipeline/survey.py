"""What there is to compute on now: this machine, the members that lend, bare rpc-servers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import trio

from discovery.grants import LENDERS, Role
from meshnode.config import Address
from meshnode.engine.devices import Device, cpu_device
from meshnode.engine.rpc_probe import RpcDeviceFacts, probe_rpc_server
from meshnode.errors import MeshError
from meshnode.models.peers.listing import is_identity
from meshnode.nurseries import bare_nursery
from meshnode.pipeline.borrow import ask_facts
from meshnode.pipeline.figures import Figures
from meshnode.pipeline.holdings import AskHolder, ask_holdings
from meshnode.pipeline.inventory import Inventory, is_gpu, keep_reserve
from meshnode.pipeline.machines import links_of, machines_row
from meshnode.pipeline.plan import PlanDevice, PlanNode
from meshnode.pipeline.protocol import WorkerFacts
from meshnode.pipeline.speeds import Links, Speed
from meshnode.pipeline.ways import links_of_ways
from tunnels import PeerId, Session

log = logging.getLogger(__name__)

LOCAL_NAME = "local"
LINK_BYTES_PER_S = {"quic": 30e6, "webrtc": 10e6}
"""What these kinds of links carry at most, being driven by Python; TCP is as fast as its wire."""


@dataclass(frozen=True)
class Lender:
    """A node that layers can be placed on: a member with a session, or a bare rpc-server.

    `name` is unique among the lenders of one survey.
    """

    name: str
    session: Session | None
    facts: WorkerFacts | None
    bare: Address | None = None
    bare_devices: tuple[RpcDeviceFacts, ...] = ()

    def plan_node(self) -> PlanNode:
        if self.facts is None:
            devices = tuple(
                PlanDevice(f"device{index}", device.free_bytes, is_gpu=True)
                for index, device in enumerate(self.bare_devices)
            )
            return PlanNode(self.name, is_local=False, devices=devices)
        link = self.session.best_link if self.session else None
        free_bytes = sum(device.free_bytes for device in self.facts.devices) or 1
        devices = tuple(
            PlanDevice(
                device.name,
                self.facts.usable_bytes * device.free_bytes // free_bytes,
                is_gpu=device.is_gpu,
                measured=device.speed,
            )
            for device in self.facts.devices
        )
        bytes_per_s = LINK_BYTES_PER_S.get(link.kind) if link else None
        rtt_s = self.session.rtt_s if self.session else None
        return PlanNode(self.name, False, devices, bytes_per_s, rtt_s)


def local_node(
    devices: Sequence[Device], speed: Callable[[Device], Speed | None] = lambda _device: None
) -> PlanNode:
    """This machine as it is now. speed: of a device, where that is known."""
    return PlanNode(
        LOCAL_NAME,
        is_local=True,
        devices=tuple(
            PlanDevice(device.name, keep_reserve(device.free_bytes), is_gpu(device), speed(device))
            for device in devices
        ),
    )


class Census:
    """I tell the other commands of this home what machines there are to plan for."""

    def __init__(
        self,
        peer: PeerId,
        introduced: Callable[[], Sequence[Session]],
        roles: Callable[[PeerId], Set[Role]],
    ) -> None:
        """peer: this node."""
        self._peer = peer
        self._introduced = introduced
        self._roles = roles
        self.inventory: Inventory | None = None  # of a node that computes
        self.figures: Figures | None = None
        self.ask_holder: AskHolder | None = None

    async def answer(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """This machine, whether or not it lends, and those that do; and what these hold of the
        model that the question names by its identity."""
        if self.inventory is not None:
            await self.inventory.refresh()
        devices = self.inventory.devices if self.inventory else (cpu_device(),)
        sessions = [
            session
            for session in self._introduced()
            if self._roles(session.peer) & LENDERS and not session.suspected
        ]
        lenders = await find_fresh(sessions, (), self.figures)
        local = local_node(devices, self.figures.speed) if self.figures else local_node(devices)
        nodes = (local, *(lender.plan_node() for lender in lenders))
        links = links_between(nodes, lenders, self._peer, self.figures)
        identity, held = request.get("model"), {}
        if self.ask_holder and isinstance(identity, str) and is_identity(identity):
            peers = {one.name: one.session.peer for one in lenders if one.session}
            held = await ask_holdings(self.ask_holder, identity, peers)
        return machines_row(nodes, links, held)


async def find_fresh(
    sessions: Sequence[Session], bare_rpc: Sequence[Address], figures: Figures | None
) -> tuple[Lender, ...]:
    """As `find_lenders`, once all machines have been measured, or some seconds later."""
    async with bare_nursery() as nursery:
        if figures:
            nursery.start_soon(figures.settle)
        found = await find_lenders(sessions, bare_rpc, fresh=True)
    return found


def links_between(
    nodes: Sequence[PlanNode],
    lenders: Sequence[Lender],
    me: PeerId,
    figures: Figures | None,
    parted: Callable[[PeerId, PeerId], bool] = lambda _one, _other: False,
) -> Links:
    """What all of them together know of the ways between them. parted: whether two workers are
    known not to reach each other."""
    peers = {lender.session.peer: lender.name for lender in lenders if lender.session}
    told = [(lender.name, lender.facts.ways) for lender in lenders if lender.facts]
    own = (LOCAL_NAME, figures.ways() if figures else ())
    known = links_of_ways({me: LOCAL_NAME, **peers}, [own, *told], LOCAL_NAME)
    apart = frozenset(
        (peers[one], peers[other]) for one, other in permutations(peers, 2) if parted(one, other)
    )
    # Without a word of the other end a link is as its kind is.
    pairs = dict(links_of(nodes).pairs)
    pairs |= {pair: link for pair, link in known.items() if link.is_measured or pair not in pairs}
    return Links(pairs, parted=apart)


async def find_lenders(
    sessions: Sequence[Session], bare_rpc: Sequence[Address], *, fresh: bool = False
) -> tuple[Lender, ...]:
    """Asks all at once, who are measured first where they are to be `fresh`. A member that does
    not answer is left out; a bare rpc-server that was
    named and does not answer is an error (`RpcUnreachable`)."""
    found: dict[int, Lender] = {}

    async def ask(index: int, session: Session) -> None:
        try:
            facts = await ask_facts(session, fresh=fresh)
        except MeshError as error:
            log.info("%s", error)
            return
        found[index] = Lender(facts.name, session, facts)

    async with trio.open_nursery() as nursery:
        for index, session in enumerate(sessions):
            nursery.start_soon(ask, index, session)
    lenders = [found[index] for index in sorted(found)]
    for address in bare_rpc:
        assert address.host is not None
        devices = await probe_rpc_server(address.host, address.port)
        lenders.append(Lender(str(address), None, None, address, devices))
    return _named_apart(lenders)


def _named_apart(lenders: Sequence[Lender]) -> tuple[Lender, ...]:
    """Two machines may carry one name: the later ones get a number."""
    taken = {LOCAL_NAME}
    named = []
    for lender in lenders:
        name, number = lender.name, 2
        while name in taken:
            name, number = f"{lender.name}-{number}", number + 1
        taken.add(name)
        named.append(Lender(name, lender.session, lender.facts, lender.bare, lender.bare_devices))
    return tuple(named)
