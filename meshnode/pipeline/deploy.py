"""The orchestrator: survey, plan, deploy, and again when what it stands on changes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from meshnode.config import DEFAULT_CTX_TOKENS, Address, ServeConfig, Split
from meshnode.connections import Connections
from meshnode.engine.abilities import OUTPUT_AT_HOME
from meshnode.engine.cache import Engine
from meshnode.engine.errors import EngineKilled, WeightsUnread
from meshnode.engine.rpc_probe import RpcUnreachable
from meshnode.errors import DiskFull, MeshError, NetworkError, ResourceError, out_of_files
from meshnode.events import Emit
from meshnode.gateway.view import Stage
from meshnode.membership import Membership
from meshnode.models.fetching import Fetcher
from meshnode.models.manifest import FileChanged, Manifest
from meshnode.models.pull.source import SourceChanged
from meshnode.models.shelf import Progress, Shelf
from meshnode.models.store.disk import NoRoom
from meshnode.models.store.slice import in_use
from meshnode.nurseries import accompanied_by, bare_nursery
from meshnode.pipeline.borrow import LeaseRefused
from meshnode.pipeline.cache_options import cache_options, slots_of
from meshnode.pipeline.costs import plan_model
from meshnode.pipeline.deployment import Deployment, Placement
from meshnode.pipeline.figures import Figures
from meshnode.pipeline.guests import Guests, embeds
from meshnode.pipeline.holdings import AskHolder
from meshnode.pipeline.inventory import Inventory
from meshnode.pipeline.layers import parse_layers, parse_tensor_split
from meshnode.pipeline.part import part_of
from meshnode.pipeline.plan import Plan, PlanNode, PlanRequest
from meshnode.pipeline.planner import is_worth_a_restart, make_plan
from meshnode.pipeline.ring import Partings
from meshnode.pipeline.scout import Scout
from meshnode.pipeline.silence import long_silence
from meshnode.pipeline.standing import Standing
from meshnode.pipeline.steadiness import Steadiness
from meshnode.pipeline.stock import Stock
from meshnode.pipeline.survey import LOCAL_NAME, Lender
from tunnels import PeerId, Session, TunnelError

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 30.0
SHORT_OF_MEMORY_RETRY_S = 10.0
MAX_KILLED_LOADS = 3
"""Of a model that was never loaded: then the system is believed to lack the memory."""
QUIET_S = 3.0
"""Without a request, before a deployment that answers is given up for a better one."""
TRYING_AGAIN = "trying again"
LOOK_AGAIN_S, LOOKS = 10.0, 6
"""How soon, and how often, after somebody came: it may have been measured meanwhile."""


class Orchestrator:
    """I keep one model deployed on whatever machines there are."""

    def __init__(
        self,
        *,
        config: ServeConfig,
        engine: Engine,
        inventory: Inventory,
        shelf: Shelf,
        membership: Membership,
        connections: Connections,
        fetcher: Fetcher,
        runtime_folder: Path,
        log_folder: Path,
        emit: Emit,
        peer: PeerId,
        ask_holder: AskHolder,
        figures: Figures | None = None,
    ) -> None:
        """peer: this node. ask_holder: what a member holds of a model. figures: of this node's
        speed and its links, None where nothing is measured."""
        self._fetcher = fetcher
        self._config = config
        self._engine = engine
        self._inventory = inventory
        self._shelf = shelf
        self._membership = membership
        self._connections = connections
        self._runtime_folder = runtime_folder
        self._log_folder = log_folder
        self._emit = emit
        self._steadiness = Steadiness()
        self._partings = Partings()
        self._killed_loads = 0
        self._facts = shelf.find(config.model, whole=False)  # raises before anything is started
        self._guests = Guests(config, shelf, self._facts)
        self._layers = None if config.layers is None else parse_layers(config.layers)
        self._ctx_tokens = config.ctx_tokens or DEFAULT_CTX_TOKENS
        self._slots = slots_of(config.engine_options)
        split = config.tensor_split
        self._tensor_split = None if split is None else parse_tensor_split(split)
        self.standing = Standing(self._facts.name, emit)
        self._stock: Stock | None = None  # asked for each plan that is to run
        self._by_figures = False  # the plan that runs was made with everything measured
        self._lacks_figures = False  # one made now would not be
        self._scout = Scout(
            *(peer, engine, membership, connections, figures, ask_holder),
            warn=lambda text, node: self.standing.warn(text, node=node),
        )

    # -- the loop -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Deploys for ever. Raises a `MeshError` only for what trying again cannot mend."""
        self.standing.enter(Stage.STARTING, "connecting to the mesh")
        if 0 < self._facts.n_ctx_train < (self._config.ctx_tokens or 0):
            self.standing.warn(
                f"--ctx {self._config.ctx_tokens} is more than the {self._facts.n_ctx_train} "
                f"tokens that {self._facts.name} was trained on: answers may get worse beyond them"
            )
        await self._connections.settled.wait()
        retry_s = FIRST_RETRY_S
        while True:
            changed, times_ready = self._membership.changed, self.standing.times_ready
            try:
                await self._serve(await self._place())
                retry_s = FIRST_RETRY_S
            except (MeshError, TunnelError, OSError) as caught:
                error = out_of_files(caught) or caught
                if isinstance(error, OSError) or self._is_final(error):
                    raise
                retry_s = FIRST_RETRY_S if self.standing.times_ready > times_ready else retry_s
                # A worker that refuses may still be freeing an earlier lease: it is asked again.
                short_of = isinstance(error, ResourceError) and not isinstance(error, LeaseRefused)
                of_disk = isinstance(error, DiskFull | NoRoom)
                next_step = "waiting for workers" if short_of and not of_disk else TRYING_AGAIN
                self.standing.withdraw(str(error), next_step)
                # Memory may also come back without anyone joining, so no wait is for ever.
                with trio.move_on_after(SHORT_OF_MEMORY_RETRY_S if short_of else retry_s):
                    await changed.wait()
                retry_s = min(2 * retry_s, LAST_RETRY_S)

    def _lost(self, error: MeshError) -> None:
        """Of a deployment that is being ended. Whoever waits for an answer hears it at once."""
        if self.standing.is_answering:
            self.standing.withdraw(str(error), TRYING_AGAIN)

    def _is_final(self, error: MeshError | TunnelError) -> bool:
        """Whether trying again cannot help: what was asked is wrong, or nobody else can come.

        A node that has answered once never gives up: what worked may work again.
        """
        if self.standing.was_ready:
            return False
        if isinstance(error, EngineKilled):
            self._killed_loads += 1
            return self._killed_loads >= MAX_KILLED_LOADS
        if isinstance(error, LeaseRefused | FileChanged | WeightsUnread | TunnelError):
            return False
        if isinstance(error, ResourceError):
            return self._config.split is Split.NEVER or bool(self._config.bare_rpc)
        return not isinstance(error, NetworkError) or isinstance(
            error, RpcUnreachable | SourceChanged
        )

    async def _place(self) -> Placement:
        """Surveys, plans, digests. Raises `ResourceError` where the model does not fit."""
        self.standing.enter(Stage.PLANNING, "asking the mesh's machines what they have")
        await self._inventory.refresh()
        # Read anew each time: the file may be another one by now.
        find = partial(self._shelf.find, self._config.model, whole=False)
        self._facts = await trio.to_thread.run_sync(find)
        # Who has answered once does not wait for figures: somebody's answer was cut.
        fresh = self._may_go_by_speed() and not self.standing.was_ready
        lenders = await self._survey(self._config.bare_rpc, fresh=fresh)
        whole = self._scout.local(self._inventory.devices)
        local = self._guests.make_room(whole, self._ctx_tokens, self._slots)
        self._stock = await self._scout.stock(self._facts, lenders)
        plan = self._plan_with(local, lenders)
        device = self._guests.choose_device(whole, self._ctx_tokens, self._slots)
        speculation = self._guests.speculation(self._facts, plan, device=device, slots=self._slots)
        by_name = {lender.name: lender for lender in lenders}
        chosen = tuple(by_name[name] for name in plan.rpc_nodes)
        divide = partial(part_of, self._facts, plan, chosen, self._fetcher, self._config.source)
        part = await trio.to_thread.run_sync(divide)
        proves = part is None and any(lender.session for lender in chosen)
        manifest = await self._digest() if proves else None
        return Placement(
            local=local,
            model=self._facts.path,
            model_name=self._facts.name,
            plan=plan,
            lenders=chosen,
            manifest=manifest,
            ctx_tokens=self._ctx_tokens,
            slots=self._slots,
            threads=self._config.threads,
            engine_options=self._guests.options(plan, speculation, device),
            speculation=speculation,
            wire_type=self._config.wire_type,
            part=part,
        )

    async def _survey(
        self, bare_rpc: Sequence[Address], *, fresh: bool = False
    ) -> tuple[Lender, ...]:
        if self._config.split is Split.NEVER:
            return ()
        sessions = self._scout.sessions()
        self._steadiness.observe([session.peer for session in sessions], trio.current_time())
        return await self._scout.lenders(sessions, bare_rpc, fresh=fresh)

    def _plan_with(self, local: PlanNode, lenders: Sequence[Lender]) -> Plan:
        """A plan without those that were lost again and again, or with them where it takes them."""
        now = trio.current_time()
        steady = [
            lender
            for lender in lenders
            if lender.session is None or not self._steadiness.is_left_out(lender.session.peer, now)
        ]
        try:
            return self._plan(local, steady)
        except MeshError:
            if len(steady) == len(lenders):
                raise
            return self._plan(local, lenders)

    def _plan(self, local: PlanNode, lenders: Sequence[Lender]) -> Plan:
        request = replace(self._request(local, lenders), stock=self._stock)
        self._by_figures = request.is_measured
        return make_plan(request)

    def _request(self, local: PlanNode, lenders: Sequence[Lender]) -> PlanRequest:
        split = self._split(bool(lenders))
        if not lenders and (split is Split.ALWAYS or self._names_others()):
            raise ResourceError("no worker is connected: run the join command on another machine")
        away = self._named_and_away({lender.name for lender in lenders})
        if away:
            raise ResourceError(f"{', '.join(away)}: a member that --layers names is not connected")
        nodes = (local, *(lender.plan_node() for lender in lenders))
        return PlanRequest(
            model=plan_model(self._facts),
            nodes=nodes,
            ctx_tokens=self._ctx_tokens,
            slots=self._slots,
            cache=cache_options(self._config.engine_options, self._ctx_tokens, self._slots),
            split=split,
            layers=self._layers,
            tensor_split=self._tensor_split,
            output_may_stay=OUTPUT_AT_HOME and not embeds(self._config.engine_options),
            objective=self._config.objective,
            links=self._scout.links(nodes, lenders, self._partings),
            wire_bytes=self._config.wire_type.number_bytes,
        )

    def _split(self, has_lenders: bool) -> Split:
        """The demo model is there to be seen on several nodes, as soon as there are several."""
        if self._config.split is not None:
            return self._config.split
        by_speed = self._config.objective is not None
        shows_off = not by_speed and (self._config.model is None or bool(self._config.bare_rpc))
        return Split.ALWAYS if shows_off and has_lenders else Split.AUTO

    def _may_go_by_speed(self) -> bool:
        """Whether figures would decide, if all were known."""
        by_hand = self._layers is not None or self._tensor_split is not None
        return not by_hand and self._split(True) is Split.AUTO

    def _names_others(self) -> bool:
        """Whether a layout by hand counts on nodes besides this one."""
        by_range = any(given.node != LOCAL_NAME for given in self._layers or ())
        return by_range or len(self._tensor_split or ()) > 1

    def _named_and_away(self, connected: Collection[str]) -> list[str]:
        """Members that the layout by hand counts on and that are not here yet, or not now."""
        members = {member.name for member in self._membership.members()}
        named = {given.node for given in self._layers or ()}
        return sorted((named & members) - {LOCAL_NAME, *connected})

    async def _digest(self) -> Manifest:
        text = f"digesting {self._facts.name}: once, to prove that all nodes have the same weights"
        self.standing.enter(Stage.DIGESTING, text, 0.0)
        progress = Progress()

        async def show() -> None:
            while True:
                done_bytes, total_bytes = await progress.next()
                self.standing.progress(Stage.DIGESTING, text, done_bytes / max(1, total_bytes))

        async with accompanied_by(show):
            manifest = await self._shelf.manifest(self._facts, progress)
        return manifest

    async def _serve(self, placement: Placement) -> None:
        """Runs one deployment to its end, which is an error, or until a better plan is due."""
        self.standing.planned(placement)
        deployment = Deployment(
            placement,
            engine=self._engine,
            runtime_folder=self._runtime_folder,
            log_folder=self._log_folder,
            emit=self._emit,
            on_step=self.standing.progress,
            on_loss=self._lost,
            partings=self._partings,
        )
        if placement.lenders:
            names = ", ".join(lender.name for lender in placement.lenders)
            self.standing.enter(Stage.LEASING, f"asking {names} for memory")
        try:
            files = [placement.model, *self._guests.files]
            with in_use(files), self._scout.computing():
                await self._run(deployment, placement)
        finally:
            sessions = [lender.session for lender in placement.lenders if lender.session]
            gone = {session.peer for session in sessions if session.closed.is_set()}
            for peer in deployment.failed | gone:
                self._steadiness.lost(peer, trio.current_time())

    async def _run(self, deployment: Deployment, placement: Placement) -> None:
        async with bare_nursery() as nursery:
            nursery.start_soon(self._end_for_a_better_plan, placement, nursery.cancel_scope)
            for lender in placement.lenders:
                if lender.session is not None:
                    nursery.start_soon(self._hold_while_silent, lender.session, lender.name)
            await deployment.run(
                partial(self.standing.ready, embeddings=embeds(self._config.engine_options))
            )

    async def _hold_while_silent(self, session: Session, name: str) -> None:
        """Nobody begins to wait for an answer that may be minutes away (decision 9). Those who wait
        already go on: what was computed for them is still there, on both machines."""
        while await long_silence(session):
            with self.standing.held_up(
                f"{name} has not been heard for {session.silence_s:.0f} s; its answers under "
                "way wait for it, new requests may be sent again later"
            ):
                await session.wait_heard()

    # -- a better plan ------------------------------------------------------------------------

    async def _end_for_a_better_plan(self, running: Placement, scope: trio.CancelScope) -> None:
        """Ends the deployment when a plan made now would use workers that have no part in it: at a
        quiet moment, since no answer in flight is cut for it, however long that takes."""
        looks = LOOKS
        while True:
            changed = self._membership.changed
            unused = await self._unused_workers(running)
            due_s = max(map(self._counted_on_at, unused), default=math.inf)
            looks_again = self._lacks_figures and not unused and looks > 0
            with trio.move_on_after(LOOK_AGAIN_S if looks_again else math.inf):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_when_set, changed, nursery.cancel_scope)
                    await trio.sleep_until(due_s)
                    await self.standing.wait_until_quiet(QUIET_S)
                    if self.standing.is_withdrawn:
                        return  # it was lost meanwhile, and is being ended
                    names = ", ".join(lender.name for lender in unused)
                    self.standing.withdraw(f"{names} can take a share now", "planning again")
                    scope.cancel()
            looks = LOOKS if changed.is_set() else looks - 1

    async def _unused_workers(self, running: Placement) -> list[Lender]:
        """Those that have no part in the running plan and would have one in a plan made now, with
        what it holds itself taken as free."""
        used = {lender.session.peer: lender for lender in running.lenders if lender.session}
        if any(lender.session.suspected for lender in used.values() if lender.session):
            return []  # it holds layers, and may be back at any moment
        bare = [lender for lender in running.lenders if lender.bare]
        lenders = [*await self._survey(()), *bare]  # a bare one answers one client at a time
        present = []
        for lender in lenders:
            there = used.get(lender.session.peer, lender) if lender.session else lender
            facts = there.facts and lender.facts and replace(there.facts, ways=lender.facts.ways)
            present.append(replace(there, name=lender.name, facts=facts))
        try:
            request = self._request(running.local, present)
            plan = make_plan(request)
        except MeshError:
            return []  # a layout by hand that does not fit with more nodes: what runs stays
        can_come = self._scout.measures and self._may_go_by_speed()
        self._lacks_figures = can_come and not request.is_measured
        if self._lacks_figures and self._by_figures:
            return []  # what is not measured yet is no reason to give up what was planned by speed
        if not is_worth_a_restart(request, running.plan, plan):
            return []
        return [
            lender
            for lender in lenders
            if lender.session and lender.session.peer not in used and lender.name in plan.rpc_nodes
        ]

    def _counted_on_at(self, lender: Lender) -> float:
        assert lender.session is not None
        return self._steadiness.counted_on_at(lender.session.peer, trio.current_time())


async def _cancel_when_set(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
