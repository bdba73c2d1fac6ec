"""What a node computes with and for whom: its models, what it lends, what it serves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from discovery.grants import COMPUTING
from meshnode.config import LendConfig, NodeConfig, PullSource, ServeConfig
from meshnode.connections import Connections
from meshnode.engine.cache import Engine
from meshnode.engine.sandbox.check import prepare_sandbox
from meshnode.engine.speed import KEPT_FOLDER, Speeds
from meshnode.events import Emit
from meshnode.gateway.model_pull import Pulls
from meshnode.gateway.model_routes import ModelRoutes
from meshnode.membership import Membership
from meshnode.models.fetching import Fetcher, nobody
from meshnode.models.peers.directory import Directory
from meshnode.models.peers.offers import Offers
from meshnode.models.peers.overview import Lookout
from meshnode.models.peers.service import StoreService
from meshnode.models.peers.source import Holders
from meshnode.models.shelf import Shelf
from meshnode.models.store.store import Store
from meshnode.models.web import Web, kind_of
from meshnode.operator_key import load_or_make_key
from meshnode.peers import Peers
from meshnode.pipeline.deploy import Orchestrator
from meshnode.pipeline.errand import Errand
from meshnode.pipeline.figures import Figures
from meshnode.pipeline.gauge import Gauge
from meshnode.pipeline.inventory import Inventory
from meshnode.pipeline.lease import LeaseDesk
from meshnode.pipeline.order_desk import OrderDesk
from meshnode.pipeline.orders import Orders, Target
from meshnode.pipeline.probing import Probing
from meshnode.pipeline.pulling import Puller
from meshnode.pipeline.quota import Quota
from meshnode.pipeline.user_pulls import UserPulls
from meshnode.state import Home
from tunnels import Endpoint, PeerId, Session


@dataclass(frozen=True)
class Place:
    """Where a node's equipment stands: the rest of the node, as it needs that."""

    home: Home
    config: NodeConfig
    engine: Engine
    inventory: Inventory
    membership: Membership
    connections: Connections
    peers: Peers
    peer: PeerId
    runtime_folder: Path
    emit: Emit


class Equipment:
    """I put together what works with models. `desk`: where it lends; `orchestrator`: where it
    serves; `model_routes`: where it has a gateway; `figures`: where it is measured;
    `holders`: who has what."""

    def __init__(self, place: Place, lend: LendConfig | None, serve: ServeConfig | None) -> None:
        self._place = place
        home, config = place.home, place.config
        self._store = Store(home.subfolder("models"))
        self._folders = folders = (self._store.folder, *config.model_folders)
        self._shelf = Shelf(folders, home.subfolder("manifests"))
        self._logs = home.subfolder("logs")
        self._web = Web(offline=config.offline, named=serve.source if serve else None)
        self._registry = self._shelf.registry()
        self._offers = Offers(self._store, self._registry)
        members = place.connections.introduced, self._name_of
        self.holders = Holders(*members)
        own_name = place.membership.name
        self._directory = Directory(*members, self._offers.listed, own_name)
        self._fetcher = Fetcher(self._store, self._web.open_for_user, self.holders.find)
        self._store_service = StoreService(self._offers, config.upload_bytes_per_s, folders)
        self._quota = Quota(self._store, lend.pull_limit_bytes if lend else None)
        self._allowed = lend.allow_pull if lend else frozenset()
        find_holders = self.holders.find if PullSource.PEERS in self._allowed else nobody
        web = self._web
        self._for_others = self._fetcher.under_other_rules(web.open_for_stranger, find_holders)
        self._orders = Orders(
            place.peers.named,
            place.membership.member_name,
            place.peers.reach,
            self._directory,
        )
        puller = self._puller(self._fetcher)
        self.user_pulls = UserPulls(own_name, str(place.peer), puller, self._orders)
        self._order_desk = self._make_order_desk()
        has_gateway = bool(serve.http if serve else lend and lend.http)
        threads = lend.threads if lend else serve.threads if serve else None
        self.figures = self._figures(threads) if config.measures else None
        self.desk = self._desk(lend) if lend else None
        self.orchestrator = self._orchestrator(serve) if serve else None
        self.model_routes = self._model_routes() if has_gateway else None

    def _name_of(self, session: Session) -> str:
        return self._place.membership.member_name(session.peer)

    def offer_services(self, endpoint: Endpoint) -> None:
        self._store_service.offer(endpoint)
        self._order_desk.offer(endpoint)
        if self.figures:
            self.figures.offer(endpoint)
        if self.desk:
            self._place.membership.may_push = self.desk.pushing.may_push
            self.desk.offer_services(endpoint)

    async def run(self) -> None:
        """Measures this machine and its links, where that is wanted."""
        if self.figures:
            await self.figures.run()

    def _puller(self, fetcher: Fetcher) -> Puller:
        return Puller(fetcher, self._store, self._directory, self._offers)

    def _make_order_desk(self) -> OrderDesk:
        return OrderDesk(
            self._place.membership.name,
            self._puller(self._for_others),
            self._allowed,
            kind_of,
            self._quota,
            self._place.membership.member_name,
            self._place.emit,
            self._folders,
        )

    def _desk(self, lend: LendConfig) -> LeaseDesk:
        place, name = self._place, self._place.membership.name
        return LeaseDesk(
            name=name,
            engine=place.engine,
            inventory=place.inventory,
            lend=lend,
            shelf=self._shelf,
            runtime_folder=place.runtime_folder,
            log_folder=self._logs,
            emit=place.emit,
            sandbox=prepare_sandbox(lend.sandbox, (place.home.folder,)),
            reach=place.connections.reach_for,
            fetch=Errand(
                name, self._store, self._for_others, self._allowed, kind_of, self._quota
            ).fetch,
            figures=self.figures,
        )

    def _orchestrator(self, serve: ServeConfig) -> Orchestrator:
        place = self._place
        return Orchestrator(
            config=serve,
            engine=place.engine,
            inventory=place.inventory,
            shelf=self._shelf,
            membership=place.membership,
            connections=place.connections,
            fetcher=self._fetcher,
            runtime_folder=place.runtime_folder,
            log_folder=self._logs,
            emit=place.emit,
            peer=place.peer,
            ask_holder=self.holders.ask,
            figures=self.figures,
        )

    def _figures(self, threads: int | None) -> Figures:
        place = self._place
        speeds = Speeds(place.home.subfolder(KEPT_FOLDER), place.engine)
        gauge = Gauge(speeds, place.inventory, threads)
        return Figures(gauge, Probing(self._colleagues), place.membership.share_mesh)

    def _colleagues(self) -> list[Session]:
        """Those who lend or borrow, as this node does."""
        roles = self._place.membership.roles
        sessions = self._place.connections.introduced()
        return [session for session in sessions if roles(session.peer) & COMPUTING]

    def _model_routes(self) -> ModelRoutes:
        return ModelRoutes(
            self._registry,
            Lookout(self._directory.listings, self.holders.ask).look,
            Pulls(self.user_pulls, self._orders),
            Target(self._place.membership.name, str(self._place.peer)),
            load_or_make_key(self._place.home.folder),
        )
