"""The worker's side of a lease: one rpc-server for one orchestrator's deployment.

The lease lives as long as its `control` stream: closed, lost or answered by the rpc-server's
death, it ends, and the rpc-server's memory is given back.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import trio

from meshnode.config import LendConfig, human_bytes
from meshnode.crash_points import reached
from meshnode.engine.cache import Engine
from meshnode.engine.children import Child
from meshnode.engine.devices import Device
from meshnode.engine.rpc_server import PushSockets, can_push, open_rpc_server
from meshnode.engine.sandbox.check import UNCONFINED, Sandbox
from meshnode.errors import (
    BadMessage,
    MeshError,
    NetworkError,
    ResourceError,
    UsageError,
    out_of_files,
)
from meshnode.events import Emit, Event, Kind
from meshnode.local_paths import without_paths
from meshnode.messages import MANIFEST_MESSAGE_BYTES, MessageStream
from meshnode.models.manifest import offered_files
from meshnode.models.shelf import Shelf
from meshnode.models.store.slice import in_use
from meshnode.nurseries import bare_nursery
from meshnode.paths import socket_path
from meshnode.pipeline.figures import Figures
from meshnode.pipeline.inventory import Inventory, is_gpu, keep_reserve
from meshnode.pipeline.matching import Fetch, Matched, Matching
from meshnode.pipeline.protocol import (
    MAX_REPORTED_TENSORS,
    PUSH_SERVICE,
    RING_VERSION,
    RPC_SERVICE,
    DeviceFacts,
    Granted,
    LeaseRequest,
    WorkerFacts,
    parse_lease_request_untrusted,
    printable,
)
from meshnode.pipeline.pushing import PUSHING, LeaseEnds, Pushing, Reach, reach_nobody
from meshnode.pipeline.usage import LeaseUse
from meshnode.state import write_durably
from tunnels import Endpoint, PeerId, Stream
from tunnels.forward import connect_and_splice
from tunnels.gate import ASK

LEASE_ID_BYTES = 8
REQUEST_TIMEOUT_S = 30.0  # to say what is wanted, 16 MiB at most; and to take each answer
MAX_UNHEARD = 2  # requests of one peer that are still arriving: memory for each
MAX_LEASES_OF_ONE = 8
MAX_LEASES = 32  # in all: each is a process, however little it asks for

log = logging.getLogger(__name__)
RPC_SOCKET = "rpc.sock"
PUSH_SOCKETS = ("in.sock", "out.sock")  # no longer than the one above: paths are limited


@dataclass(frozen=True)
class Lease:
    """Reserved memory: whose, for which model, behind which socket, between which neighbours."""

    id: str
    owner: PeerId
    model: str
    memory_bytes: int
    socket: Path
    ends: LeaseEnds = field(compare=False)


class LeaseDesk:
    """I lend this node's devices: I say what there is, and I keep the leases."""

    def __init__(
        self,
        *,
        name: str,
        engine: Engine,
        inventory: Inventory,
        lend: LendConfig,
        shelf: Shelf,
        runtime_folder: Path,
        log_folder: Path,
        emit: Emit,
        sandbox: Sandbox = UNCONFINED,
        reach: Reach = reach_nobody,
        fetch: Fetch | None = None,
        figures: Figures | None = None,
    ) -> None:
        """fetch: None where this worker pulls nothing. figures: None where nothing is measured."""
        self._name = name
        self._engine = engine
        self._inventory = inventory
        self._names = _chosen(inventory.devices, lend.devices)
        self._lend = lend
        self._shelf = shelf
        self._matching = Matching(shelf, fetch)
        self._runtime_folder = runtime_folder
        self._log_folder = log_folder
        self._emit = emit
        self.sandbox = sandbox
        self.pushing = Pushing(reach)
        self._knows_ring = can_push(engine)
        self._leases: dict[str, Lease] = {}
        self._server_pids: set[int] = set()
        self._unheard: Counter[PeerId] = Counter()
        self._use = LeaseUse()
        self._figures = figures

    @property
    def leases(self) -> tuple[Lease, ...]:
        return tuple(self._leases.values())

    def facts(self, asker: PeerId | None = None) -> WorkerFacts:
        return WorkerFacts(
            name=self._name,
            engine_key=self._engine.key,
            backend=self._engine.backend,
            usable_bytes=self.usable_bytes(),
            devices=tuple(
                DeviceFacts(
                    *(d.name, d.description, is_gpu(d), d.total_bytes, d.free_bytes),
                    speed=self._figures.speed(d) if self._figures else None,
                )
                for d in self._lent_devices()
            ),
            models=tuple(printable(name) for name in self._shelf.names()),
            ways=self._figures.ways(asker) if self._figures else (),
        )

    def usable_bytes(self) -> int:
        """What may still be lent, leases that run taken off.

        What an rpc-server of ours holds already is both lent and not free any more, so it is
        counted once: free memory plus what our leases hold, less what they were promised.
        """
        lent_bytes = sum(lease.memory_bytes for lease in self._leases.values())
        if self._lend.memory_bytes is not None:
            return max(0, self._lend.memory_bytes - lent_bytes)
        devices = self._lent_devices()
        free_bytes = sum(device.free_bytes for device in devices)
        if any(is_gpu(device) for device in devices):
            total_bytes = sum(device.total_bytes for device in devices)
            return max(0, min(keep_reserve(free_bytes), keep_reserve(total_bytes) - lent_bytes))
        return max(0, keep_reserve(free_bytes + self.held_bytes()) - lent_bytes)

    def _lent_devices(self) -> tuple[Device, ...]:
        return tuple(d for d in self._inventory.devices if d.name in self._names)

    def held_bytes(self) -> int:
        """Resident memory of our rpc-servers, which is free no more."""
        resident_bytes = 0
        for pid in self._server_pids:
            try:
                resident_bytes += psutil.Process(pid).memory_info().rss
            except psutil.Error:
                continue
        return resident_bytes

    # -- services -----------------------------------------------------------------------------

    def offer_services(self, endpoint: Endpoint) -> None:
        endpoint.serve("control", self.serve_control, ASK)
        endpoint.serve(RPC_SERVICE, self.serve_rpc)
        endpoint.serve(PUSH_SERVICE, self.pushing.serve, PUSHING)

    async def serve_control(self, stream: Stream) -> None:
        try:
            await self._serve_control(stream)
        except OSError as error:
            lack = out_of_files(error)
            if lack is None:
                raise
            log.warning("%s of %s failed: %s", stream.service, stream.peer.short, lack)
            stream.reset(str(lack))

    async def _serve_control(self, stream: Stream) -> None:
        messages = MessageStream(stream)
        try:
            request = await self._hear_request(stream.peer, messages)
            if request.get("op") == "facts":
                with trio.fail_after(REQUEST_TIMEOUT_S):
                    await self._be_measured(fresh=request.get("fresh") is True)
                    await self._inventory.refresh()
                    await messages.send(self.facts(stream.peer).to_message())
                    await stream.send_eof()
            elif request.get("op") == "lease":
                with self._figures.computing() if self._figures else nullcontext():
                    await self._inventory.refresh()
                    await self._serve_lease(stream, messages, request)
            else:
                raise BadMessage("the peer asks for an operation this version does not know")
        except NetworkError as error:
            log.info("a request of %s failed: %s", stream.peer.short, error)
            stream.reset(str(error))
        except trio.TooSlowError:
            stream.reset(f"the conversation stood still for {REQUEST_TIMEOUT_S:.0f} s")

    async def _hear_request(self, peer: PeerId, messages: MessageStream) -> Mapping[str, Any]:
        """The first message, which may be large: hence few at a time of one peer."""
        if self._unheard[peer] >= MAX_UNHEARD:
            raise BadMessage("the peer begins many requests and finishes none")
        self._unheard[peer] += 1
        try:
            with trio.fail_after(REQUEST_TIMEOUT_S):
                return await messages.receive_untrusted(MANIFEST_MESSAGE_BYTES)
        finally:
            self._unheard[peer] -= 1
            if not self._unheard[peer]:
                del self._unheard[peer]

    async def _be_measured(self, *, fresh: bool) -> None:
        """Somebody plans: with what is known, or with what can be found out first."""
        if self._figures and fresh:
            await self._figures.settle()
        elif self._figures:
            self._figures.want()

    async def serve_rpc(self, stream: Stream) -> None:
        lease = self._leases.get(stream.service.removeprefix(RPC_SERVICE))
        if lease is None or lease.owner != stream.peer:
            stream.reset("no such lease: it has ended, or belongs to another node")
            return
        with self._use.stream(lease.id):
            await connect_and_splice(stream, lease.socket)

    async def _serve_lease(
        self, stream: Stream, messages: MessageStream, message: Mapping[str, Any]
    ) -> None:
        """One lease from request to end. The owner's end of the stream is the end of it all."""
        ends = LeaseEnds(stream.peer)
        async with bare_nursery() as nursery:
            nursery.start_soon(self.pushing.hear_owner, messages, ends, nursery)
            try:
                request = parse_lease_request_untrusted(message)
                lease = self._reserve(ends, request)
                try:
                    reached("lease.reserved")
                    matched = await self._matching.match(
                        lease.owner, lease.model, request.wanted, request.order, messages
                    )
                    with in_use(offered_files(matched.local.engine_manifest)):
                        await self._lend_until_end(messages, lease, matched)
                finally:
                    reached("end.lease")
                    del self._leases[lease.id]
                    self._use.end(lease.id)
                    self.pushing.end(lease.id)
                    self._tell(lease, f"lease for {lease.model} ended, memory is free again")
            except (MeshError, OSError) as caught:
                error = out_of_files(caught) or caught
                if isinstance(error, OSError):
                    raise
                log.info("a lease of %s is refused: %s", stream.peer.short, error)
                reason = without_paths(str(error), (*self._shelf.folders, self._log_folder))
                await _say(messages, {"event": "refused", "reason": reason[:500]})
            await stream.send_eof()
            nursery.cancel_scope.cancel()

    def _reserve(self, ends: LeaseEnds, request: LeaseRequest) -> Lease:
        """Enters the lease, so that nobody else is promised its memory while it comes up."""
        if request.engine_key != self._engine.key:
            raise UsageError(
                f"{self._name} runs engine {self._engine.key}, the orchestrator "
                f"{request.engine_key}: install the same mesh version on both, then run "
                "`mesh engine build` on each"
            )
        owner = ends.owner
        if sum(lease.owner == owner for lease in self.leases) >= MAX_LEASES_OF_ONE:
            raise ResourceError(
                f"{self._name} lends to this node {MAX_LEASES_OF_ONE} times already: end one first"
            )
        if len(self._leases) >= MAX_LEASES:
            raise ResourceError(f"{self._name} lends {MAX_LEASES} times already: try again later")
        usable_bytes = self.usable_bytes()
        if request.memory_bytes > usable_bytes:
            raise ResourceError(
                f"{self._name} can lend {human_bytes(usable_bytes)}, not "
                f"{human_bytes(request.memory_bytes)}: end other leases, raise --memory, or give "
                "it fewer layers"
            )
        lease_id = secrets.token_hex(LEASE_ID_BYTES)
        lease = Lease(
            id=lease_id,
            owner=owner,
            model=request.model,
            memory_bytes=request.memory_bytes,
            socket=socket_path(self._runtime_folder, f"rpc-{lease_id}/{RPC_SOCKET}"),
            ends=ends,
        )
        self._leases[lease_id] = lease
        return lease

    async def _lend_until_end(
        self, messages: MessageStream, lease: Lease, matched: Matched
    ) -> None:
        """Runs the rpc-server, until it ends by itself or we are cancelled."""
        match = matched.local
        folder = lease.socket.parent  # its own: all that the rpc-server may change
        folder.mkdir(mode=0o700)
        manifest = folder / "manifest"
        pushes = PushSockets(*(folder / name for name in PUSH_SOCKETS))
        try:
            sockets = pushes if self._knows_ring else None
            write_durably(manifest, match.engine_manifest.encode(errors="surrogateescape"))
            reached("lease.manifest")
            async with open_rpc_server(
                self._engine,
                lease.socket,
                manifest=manifest if match.usable else None,
                memory_limit_bytes=lease.memory_bytes,
                devices=self._names,
                threads=self._lend.threads,
                pushes=sockets,
                log=self._log_folder / "rpc-server.log",
                sandbox=self.sandbox,
                model_files=offered_files(match.engine_manifest),
            ) as child:
                self._server_pids.add(child.pid)
                reached("lease.started")
                try:
                    self.pushing.begin(lease.id, lease.ends, sockets)
                    await _say(messages, _granted(lease.id, matched, sockets).to_message())
                    self._tell(lease, f"lent {human_bytes(lease.memory_bytes)} for {lease.model}")
                    reason = await self._until_over(lease, child)
                finally:
                    self._server_pids.remove(child.pid)
                await _say(messages, {"event": "ended", "reason": reason})
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _until_over(self, lease: Lease, child: Child) -> str:
        """Until the rpc-server ends or nobody has used it for long; returns which, in words."""
        reason = f"the rpc-server on {self._name} ended; its log is there"
        async with trio.open_nursery() as nursery:

            async def until_unused() -> None:
                nonlocal reason
                await self._use.until_unused(lease.id)
                reason = f"nothing used the lease on {self._name} for long: ask for a new one"
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_unused)
            await child.wait()
            nursery.cancel_scope.cancel()
        return reason

    def _tell(self, lease: Lease, text: str) -> None:
        data = {"lease": lease.id, "owner": str(lease.owner), "memory_bytes": lease.memory_bytes}
        self._emit(Event(Kind.LEASE, text, data))


async def _say(messages: MessageStream, message: Mapping[str, Any]) -> None:
    """To an owner that may take nothing of it: a lease is not held for that. Raises
    `trio.TooSlowError`."""
    with trio.fail_after(REQUEST_TIMEOUT_S):
        await messages.send(message)


def _granted(lease_id: str, matched: Matched, sockets: PushSockets | None) -> Granted:
    match = matched.local
    return Granted(
        lease=lease_id,
        usable_count=len(match.usable),
        missing_count=match.missing_count,
        differing_count=len(match.differing),
        differing=match.differing[:MAX_REPORTED_TENSORS],
        ring=RING_VERSION if sockets else 0,
        digests=matched.digests,
    )


def _chosen(devices: tuple[Device, ...], wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the devices the operator named, or of all GPUs, or of the CPU."""
    known = [device.name for device in devices]
    for name in wanted:
        if name not in known:
            raise UsageError(f"there is no device {name!r} here: known are {', '.join(known)}")
    gpus = tuple(device.name for device in devices if is_gpu(device))
    return wanted or gpus or tuple(known)
