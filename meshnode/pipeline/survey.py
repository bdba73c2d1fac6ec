"""What there is to compute on now: this machine, the members that lend, bare rpc-servers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from meshnode.config import Address
from meshnode.engine.devices import Device
from meshnode.engine.rpc_probe import RpcDeviceFacts, probe_rpc_server
from meshnode.errors import MeshError
from meshnode.pipeline.borrow import ask_facts
from meshnode.pipeline.inventory import is_gpu, keep_reserve
from meshnode.pipeline.plan import PlanDevice, PlanNode
from meshnode.pipeline.protocol import WorkerFacts
from tunnels import Session

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
            )
            for device in self.facts.devices
        )
        bytes_per_s = LINK_BYTES_PER_S.get(link.kind) if link else None
        return PlanNode(self.name, is_local=False, devices=devices, bytes_per_s=bytes_per_s)


def local_node(devices: Sequence[Device]) -> PlanNode:
    """This machine as it is now."""
    return PlanNode(
        LOCAL_NAME,
        is_local=True,
        devices=tuple(
            PlanDevice(device.name, keep_reserve(device.free_bytes), is_gpu(device))
            for device in devices
        ),
    )


async def find_lenders(
    sessions: Sequence[Session], bare_rpc: Sequence[Address]
) -> tuple[Lender, ...]:
    """Asks all at once. A member that does not answer is left out; a bare rpc-server that was
    named and does not answer is an error (`RpcUnreachable`)."""
    found: dict[int, Lender] = {}

    async def ask(index: int, session: Session) -> None:
        try:
            facts = await ask_facts(session)
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
