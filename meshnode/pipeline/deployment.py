"""One deployment: the leases, the forwards and the llama-server of one plan, from start to end."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NoReturn

import trio

from meshnode.config import WireType, human_bytes
from meshnode.crash_points import reached
from meshnode.engine.cache import Engine
from meshnode.engine.errors import EngineFailed, WeightsAbsent, WeightsUnread
from meshnode.engine.llama_server import LlamaServer, LlamaServerOptions, open_llama_server
from meshnode.engine.load_report import LoadProgress, ServerLoad
from meshnode.errors import MeshError, NetworkError
from meshnode.events import Emit, Event, Kind
from meshnode.gateway.view import Stage, WorkerProgress
from meshnode.models.manifest import FileChanged, Manifest, stamp, to_wire
from meshnode.models.presence import engine_presence, engine_roots
from meshnode.nurseries import bare_nursery
from meshnode.paths import socket_path
from meshnode.pipeline.borrow import Borrowed, LeaseLost, LeaseRefused, borrow
from meshnode.pipeline.headway import Headway, Pulling
from meshnode.pipeline.own_part import OwnPart
from meshnode.pipeline.part import Part
from meshnode.pipeline.plan import Plan, PlanNode
from meshnode.pipeline.protocol import RPC_SERVICE, LeaseRequest, Progress
from meshnode.pipeline.ring import Member, Partings, Ring, RingLost
from meshnode.pipeline.speculation import NO_SPECULATION, Speculation
from meshnode.pipeline.survey import Lender
from meshnode.state import write_durably
from tunnels import PeerId, Stream
from tunnels.forward import listen_and_forward

LEASE_MARGIN = 1.05
LEASE_MARGIN_BYTES = 64 * 2**20
"""Added to a share's estimate: graph reservations differ between builds and devices."""
LEASE_NEWS_S = 3.0
"""How long a dead llama-server waits for the news that a worker's death was the cause."""

OnStep = Callable[[Stage, str, float | None, tuple[WorkerProgress, ...]], None]


@dataclass(frozen=True)
class Placement:
    """A plan and all that is needed to carry it out. `lenders`: those the plan gives layers to;
    `local`: this machine as it was before it took its own share. `manifest`: the digests of this
    machine's files, None where nobody asks. `part`: where no node has the model whole."""

    local: PlanNode
    model: Path
    model_name: str
    plan: Plan
    lenders: tuple[Lender, ...]
    manifest: Manifest | None
    ctx_tokens: int
    slots: int
    threads: int | None
    engine_options: tuple[str, ...]
    speculation: Speculation = NO_SPECULATION
    wire_type: WireType = WireType.EXACT
    part: Part | None = None


@dataclass(frozen=True)
class Deployed:
    """A deployment that answers. `loads` are keyed by the lender's name."""

    server: LlamaServer
    loads: dict[str, ServerLoad]


class Deployment:
    """I carry out one placement, once."""

    def __init__(
        self,
        placement: Placement,
        *,
        engine: Engine,
        runtime_folder: Path,
        log_folder: Path,
        emit: Emit,
        on_step: OnStep,
        on_loss: Callable[[MeshError], None] = lambda _error: None,
        partings: Partings | None = None,
    ) -> None:
        """on_loss: told what `run` raises before llama-server is ended, which may take a while: it
        waits for clients that read slowly. partings: which workers lost their way to each other,
        kept between deployments."""
        self._placement = placement
        self._engine = engine
        self._runtime_folder = runtime_folder
        self._log_folder = log_folder
        self._emit = emit
        self._on_step = on_step
        self._on_loss = on_loss
        self._id = secrets.token_hex(4)
        self._lease_lost = trio.Event()
        self._borrowed: dict[str, Borrowed] = {}
        self._partings = partings or Partings()
        self._own = OwnPart(placement.part, placement.manifest, emit, self._show_pull)
        self._digesting = Headway({})
        self._pulling = Pulling()
        self._headway = Headway(placement.plan.weight_bytes)
        self.failed: set[PeerId] = set()
        """Lenders that granted no lease, or ended theirs."""

    async def run(self, on_ready: Callable[[Deployed], None]) -> None:
        """Leases, loads, calls `on_ready`, and serves until something breaks.

        Always ends in a `MeshError` that says what broke: `LeaseRefused`, `LeaseLost`,
        `RingLost`, `EngineFailed`, `SourceChanged`.
        """
        files = [self._file(suffix) for suffix in ("roots", "report", "ring", "presence")]
        try:
            async with bare_nursery() as nursery:
                async with bare_nursery() as at_once:
                    await self._own.relay()
                    at_once.start_soon(self._own.fetch)
                    endpoints = await self._open_endpoints(nursery)
                await self._own.keep_told()
                await self._own.tell_proof()
                ring = self._ring(endpoints)
                nursery.start_soon(self._keep, ring)
                try:
                    await self._serve(endpoints, ring.file, on_ready)
                except EngineFailed as error:
                    reached("end.deployment")
                    # A worker's death kills llama-server too, and is the better thing to tell: if
                    # that was it, the news cancels this wait.
                    with trio.move_on_after(LEASE_NEWS_S):
                        await self._lease_lost.wait()
                        await trio.sleep_forever()
                    raise ring.loss or error from None
        except LeaseRefused:
            if self._placement.part is not None:
                await self._placement.part.check_source()
            raise
        except RingLost as lost:
            # Not where a worker died: that ends a deployment as a `LeaseLost`, and parts nobody.
            self._partings.note(lost.pair)
            raise
        except WeightsUnread as error:
            raise WeightsUnread(self._name_lenders(str(error))) from None
        except WeightsAbsent as error:
            raise WeightsAbsent(self._name_lenders(error.what), error.tensor) from None
        finally:
            for file in files:
                file.unlink(missing_ok=True)

    async def _keep(self, ring: Ring) -> None:
        try:
            await ring.run()
        except RingLost as lost:
            self._on_loss(lost)
            raise

    async def _serve(
        self, endpoints: dict[str, str], ring: Path | None, on_ready: Callable[[Deployed], None]
    ) -> NoReturn:
        """Loads again where the engine lacks what the plan did not know that this machine needs."""
        while True:
            try:
                await self._run_server(endpoints, ring, on_ready)
            except WeightsAbsent as absent:
                what = self._name_lenders(absent.what)
                if not await self._own.fetch_lacking(absent, what):
                    raise

    async def _run_server(
        self, endpoints: dict[str, str], ring: Path | None, on_ready: Callable[[Deployed], None]
    ) -> NoReturn:
        """Runs llama-server to its end, which is an `EngineFailed`."""
        async with open_llama_server(
            self._engine,
            self._options(endpoints, ring),
            log=self._log_folder / "llama-server.log",
            on_progress=partial(self._show_load, _names(endpoints)),
        ) as server:
            self._check_files()
            on_ready(Deployed(server, self._loads(server, endpoints)))
            await server.wait()
            raise server.child.failure(f"llama-server {server.child.describe_end()}")

    def _name_lenders(self, text: str) -> str:
        for index, lender in enumerate(self._placement.lenders):
            text = text.replace(f"unix:{self._rpc_socket(index)}", lender.name)
        return text

    def _check_files(self) -> None:
        """The digests were of the files as they were; llama-server has read them since."""
        manifest = self._own.manifest
        if manifest is None:
            return
        if tuple(stamp(Path(file.path)) for file in manifest.files) != manifest.files:
            raise FileChanged(f"{self._placement.model} changed while it was loaded")

    def _show_pull(self, progress: WorkerProgress) -> None:
        news = self._pulling.take(progress, trio.current_time())
        if news is not None:
            self._emit(Event(Kind.PROGRESS, news, asdict(progress)))
        name = self._placement.model_name
        text = f"each machine is pulling its part of {name}{self._pulling.text}"
        self._on_step(Stage.PULLING, text, self._pulling.done, self._pulling.workers)

    # -- leases -------------------------------------------------------------------------------

    async def _open_endpoints(self, nursery: trio.Nursery) -> dict[str, str]:
        """Leases from all lenders at once; each lender's RPC endpoint, in the plan's order."""
        async with bare_nursery() as round_of_asking:
            for index, lender in enumerate(self._placement.lenders):
                if lender.session is not None:
                    round_of_asking.start_soon(nursery.start, self._hold_lease, lender, index)
        return {
            lender.name: str(lender.bare) if lender.bare else f"unix:{self._rpc_socket(index)}"
            for index, lender in enumerate(self._placement.lenders)
        }

    async def _hold_lease(
        self,
        lender: Lender,
        index: int,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Keeps one lease and forwards its RPC connections, until the lease ends."""
        session = lender.session
        assert session is not None

        def on_progress(progress: Progress) -> None:
            worker = WorkerProgress(lender.name, progress.done_bytes, progress.total_bytes)
            if progress.pulls:
                self._show_pull(worker)
                return
            self._digesting.take((worker,))
            text = f"{lender.name} is digesting its copy of {self._placement.model_name}"
            self._on_step(Stage.LEASING, text, self._digesting.done, self._digesting.workers)

        with self._noting_failure_of(session.peer):
            async with borrow(session, self._request(lender), on_progress) as borrowed:
                teller = f"{lender.name} ({session.peer.short})"
                self._own.hear(lender.name, teller, borrowed.granted.digests)
                service = RPC_SERVICE + borrowed.granted.lease

                async def open_rpc() -> Stream:
                    return await session.open(service)

                async with bare_nursery() as nursery:
                    await nursery.start(listen_and_forward, self._rpc_socket(index), open_rpc)
                    self._tell_grant(lender, borrowed)
                    self._borrowed[lender.name] = borrowed
                    task_status.started()
                    await borrowed.ended.wait()
                    self._lease_lost.set()
                    lost = LeaseLost(f"the lease on {lender.name} ended: {borrowed.reason}")
                    self._on_loss(lost)
                    raise lost

    @contextmanager
    def _noting_failure_of(self, peer: PeerId) -> Iterator[None]:
        try:
            yield
        except (NetworkError, LeaseRefused):
            self.failed.add(peer)
            raise

    def _request(self, lender: Lender) -> LeaseRequest:
        placement = self._placement
        wanted = placement.part.wanted if placement.part else placement.manifest
        assert wanted is not None
        assert lender.facts is not None
        share_bytes = sum(
            share.total_bytes for share in placement.plan.shares if share.node == lender.name
        )
        wanted_bytes = int(share_bytes * LEASE_MARGIN) + LEASE_MARGIN_BYTES
        return LeaseRequest(
            engine_key=self._engine.key,
            model=placement.model_name,
            memory_bytes=min(wanted_bytes, max(share_bytes, lender.facts.usable_bytes)),
            wanted=to_wire(wanted),
            order=placement.part.order(lender.name) if placement.part else b"",
        )

    def _tell_grant(self, lender: Lender, borrowed: Borrowed) -> None:
        granted = borrowed.granted
        data = {
            "node": lender.name,
            "usable_tensors": granted.usable_count,
            "differing_tensors": list(granted.differing),
            "missing_tensors": granted.missing_count,
        }
        text = f"{lender.name} has {granted.usable_count} of the model's tensors on its own disk"
        self._emit(Event(Kind.LEASE, text, data))
        if granted.differing_count:
            more = granted.differing_count - 1
            text = (
                f"{lender.name}'s file differs from this one in {granted.differing[0]}"
                + (f" and {more} more tensors" if more else "")
                + ": these are not used from there, this node's own are sent; copy the file again"
            )
            self._emit(Event(Kind.WARNING, text, data))

    def _ring(self, endpoints: dict[str, str]) -> Ring:
        """Of the workers in the order of their layers, this node where it has some between."""
        members = {
            lender.name: Member(lender.name, lender.session, endpoints[lender.name], borrowed)
            for lender in self._placement.lenders
            if lender.session and (borrowed := self._borrowed.get(lender.name))
        }
        shares = sorted(self._placement.plan.shares, key=lambda share: share.first_layer)
        chain = [members.get(node) for node, _ in groupby(share.node for share in shares)]
        return Ring(chain, self._file("ring"), self._partings, self._emit)

    # -- llama-server -------------------------------------------------------------------------

    def _options(self, endpoints: dict[str, str], ring: Path | None) -> LlamaServerOptions:
        placement = self._placement
        plan = placement.plan
        return LlamaServerOptions(
            model=placement.model,
            socket_path=socket_path(self._runtime_folder, f"llama-{self._id}.sock"),
            ctx_tokens=placement.ctx_tokens,
            slots=placement.slots,
            rpc=tuple(endpoints.values()),
            gpu_layers=plan.gpu_layers,
            tensor_split=plan.tensor_split,
            devices=plan.device_order,
            threads=placement.threads,
            alias=placement.model_name,
            roots=self._write_roots(),
            report=self._file("report") if endpoints else None,
            output_device=plan.output.device,
            ring=ring,
            presence=self._write_presence(),
            wire_type=placement.wire_type,
            extra=placement.engine_options,
        )

    def _write_roots(self) -> Path | None:
        manifest, part = self._own.manifest, self._placement.part
        if manifest is None:
            return None
        root = part.root if part else manifest.root
        return self._write("roots", engine_roots(root, [file.path for file in manifest.files]))

    def _write_presence(self) -> Path | None:
        """What of this machine's files is no hole, so that the engine takes none for weights."""
        if self._placement.part is None:
            return None
        assert self._own.manifest is not None
        return self._write(
            "presence", engine_presence(self._placement.part.held(self._own.manifest))
        )

    def _write(self, suffix: str, text: str) -> Path:
        path = self._file(suffix)
        write_durably(path, text.encode(errors="surrogateescape"))
        return path

    def _loads(self, server: LlamaServer, endpoints: dict[str, str]) -> dict[str, ServerLoad]:
        names = _names(endpoints)
        loads = {names.get(load.server, load.server): load for load in server.loads}
        for name, load in loads.items():
            text = (
                f"{name} read {load.local_tensors} tensors ({human_bytes(load.local_bytes)}) from "
                f"its own disk; {load.sent_tensors} ({human_bytes(load.sent_bytes)}) were sent"
            )
            data = {"node": name, "local_bytes": load.local_bytes, "sent_bytes": load.sent_bytes}
            self._emit(Event(Kind.LOAD, text, data))
        return loads

    def _show_load(self, names: Mapping[str, str], progress: LoadProgress) -> None:
        done = progress.done_bytes / max(1, progress.total_bytes)
        reports = (
            WorkerProgress(names.get(one.server, one.server), one.done_bytes, one.total_bytes)
            for one in progress.servers
        )
        for worker in self._headway.take(reports):
            loaded, total = human_bytes(worker.done_bytes), human_bytes(worker.total_bytes)
            text = f"{worker.node} has loaded {loaded} of {total}"
            self._emit(Event(Kind.PROGRESS, text, asdict(worker)))
        text = f"loading {self._placement.model_name}"
        self._on_step(Stage.LOADING, text, done, self._headway.workers)

    def _rpc_socket(self, index: int) -> Path:
        return socket_path(self._runtime_folder, f"to-{self._id}-{index}.sock")

    def _file(self, suffix: str) -> Path:
        return self._runtime_folder / f"llama-{self._id}.{suffix}"


def _names(endpoints: Mapping[str, str]) -> dict[str, str]:
    """Lenders by their endpoints."""
    return {endpoint: name for name, endpoint in endpoints.items()}
