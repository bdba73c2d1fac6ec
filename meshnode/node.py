"""The composition root: one nursery that owns every task of a node."""

from __future__ import annotations

import contextlib
import ipaddress
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from discovery.grants import OPEN_TO_ALL, OPEN_TO_MEMBERS
from discovery.portmap import PortMap, PortMapStatus, describe
from discovery.token import Token, encode
from meshnode.administration import OPERATIONS, Administration
from meshnode.circle import LENDS, RELAYS_FOR_OTHERS
from meshnode.config import (
    DEFAULT_INVITE_LIFETIME_S,
    DEFAULT_INVITE_USES,
    Address,
    LendConfig,
    NodeConfig,
    ServeConfig,
    human_bytes,
)
from meshnode.connections import Connections
from meshnode.control import serve_control_socket
from meshnode.engine.cache import Engine
from meshnode.equipment import Equipment, Place
from meshnode.errors import MeshError, NetworkError, UsageError
from meshnode.events import Emit, Event, Kind
from meshnode.gateway.lending import Lending
from meshnode.gateway.server import serve_gateway
from meshnode.introduction import MAX_NAME_CHARS
from meshnode.membership import Membership
from meshnode.paths import runtime_folder
from meshnode.peers import Peers
from meshnode.pipeline.inventory import Inventory
from meshnode.pipeline.lease import LeaseDesk
from meshnode.pipeline.survey import Census
from meshnode.pipeline.user_pulls import keeps_none
from meshnode.state import PORT_DOCUMENT, Home
from meshnode.whereabouts import Whereabouts, network_row
from tunnels import AddressPolicy, Endpoint, Identity, ListenFailed, PeerId
from tunnels.link import LINK_KINDS
from tunnels.network import HostNetwork
from tunnels.offline import NearNetwork
from tunnels.relay import Carries
from tunnels.turn import IceServers

FIRST_LOOK_S = 1.5
"""How long the first invite waits for servers and the router to say how we look from outside."""


class Node:
    """I put a node's parts together and run them."""

    def __init__(
        self,
        home: Home,
        config: NodeConfig,
        *,
        lend: LendConfig | None,
        serve: ServeConfig | None,
        engine: Engine | None,
        emit: Emit,
    ) -> None:
        """engine: None where the node neither lends nor serves."""
        self._home = home
        self._config = config
        self._emit = emit
        self._http = serve.http if serve else lend.http if lend else None
        name = node_name(config.name)
        identity = home.identity("node.key")
        self._membership = Membership(home, identity, name)
        self._endpoint = _endpoint_of(identity, self._membership, config)
        self._connections = Connections(self._endpoint, self._membership, emit)
        self._connections.circle.borrows = serve is not None
        record = self._membership.record
        roles = {LENDS: lend, "serve": serve, RELAYS_FOR_OTHERS: config.relays}
        record.roles = tuple(role for role, has in roles.items() if has)
        record.round_trips = self._round_trips
        self._peers = Peers(self._endpoint, self._membership, self._connections, emit)
        self._connections.replies.wait_s = config.accept_wait_s
        self._portmap: PortMap | None = None
        connections = self._connections
        self._whereabouts = Whereabouts(
            self._endpoint, connections.introduced, connections.show_again
        )
        self._administration = Administration(
            self._membership, self._connections.joining, self._endpoint.meeting_places
        )
        self._runtime_folder = _emptied(runtime_folder(home.folder))
        self._census = Census(self._endpoint.peer, connections.introduced, self._membership.roles)
        self._equipment = self._equip(engine, lend, serve) if engine else None
        self._desk = self._equipment.desk if self._equipment else None
        self._orchestrator = self._equipment.orchestrator if self._equipment else None

    def _equip(
        self, engine: Engine, lend: LendConfig | None, serve: ServeConfig | None
    ) -> Equipment:
        inventory = self._census.inventory = Inventory(engine)
        place = Place(
            home=self._home,
            config=self._config,
            engine=engine,
            inventory=inventory,
            membership=self._membership,
            connections=self._connections,
            peers=self._peers,
            peer=self._endpoint.peer,
            runtime_folder=self._runtime_folder,
            emit=self._emit,
        )
        equipment = Equipment(place, lend, serve)
        self._census.figures, self._census.ask_holder = equipment.figures, equipment.holders.ask
        return equipment

    async def run(self) -> None:
        """Runs until cancelled. Raises `MeshError` for what the user must mend."""
        try:
            await self._run()
        finally:
            with contextlib.suppress(OSError):
                self._runtime_folder.rmdir()

    async def _run(self) -> None:
        self._offer_services()
        async with trio.open_nursery() as nursery:
            await nursery.start(
                serve_control_socket,
                self._home.folder,
                {
                    "accept": self._answer_accept,
                    "status": self._answer_status,
                    "peers": self._peers.answer_peers,
                    "ping": self._peers.answer_ping,
                    "machines": self._census.answer,
                    **dict.fromkeys(OPERATIONS, self._answer_members),
                },
                {"pull": self._equipment.user_pulls.answer if self._equipment else keeps_none},
            )
            await self._listen(nursery)
            await self._open_gateway(nursery)
            if self._equipment:
                nursery.start_soon(self._equipment.run)
            if self._orchestrator:
                nursery.start_soon(self._orchestrator.run)
            self._map_ports(nursery)
            await self._look_outside()
            self._introduce_node()
            self._join_neighbours(nursery)
            await nursery.start(self._peers.run)
            nursery.start_soon(self._connections.run, self._config.joins)
            nursery.start_soon(self._whereabouts.run)

    def status(self) -> Mapping[str, Any]:
        """What `/api/v1/status` and the live view show; JSON-ready."""
        status: dict[str, Any] = {
            "node": {"name": self._membership.name, "peer": str(self._endpoint.peer)},
            "peers": self._peers.rows(),
            "network": network_row(self._endpoint.outside),
        }
        if self._portmap:
            status["port_mapping"] = self._portmap.status.row()
        if self._desk:
            status["lent"] = [
                {"model": lease.model, "memory_bytes": lease.memory_bytes, "to": str(lease.owner)}
                for lease in self._desk.leases
            ]
        if self._orchestrator:
            status |= self._orchestrator.standing.deployment_status()
        return status

    # -- parts --------------------------------------------------------------------------------

    def _offer_services(self) -> None:
        endpoint = self._endpoint
        self._connections.offer_services()
        if self._equipment:
            self._equipment.offer_services(endpoint)
        if self._orchestrator:
            self._orchestrator.standing.node_status = self.status

    async def _listen(self, nursery: trio.Nursery) -> None:
        """Opens the node's port: the one asked for, else the one of last time, else any.

        Members remember our address, so a stable port lets them come back without a new invite.
        """
        given = self._config.listen
        if given is not None and given.port:
            await self._start_endpoint(nursery, given)
            return
        host = given.host if given else None
        saved = self._home.load_json(PORT_DOCUMENT)
        port = saved.get("port") if saved else None
        if isinstance(port, int) and 0 < port < 65536:
            try:
                await self._start_endpoint(nursery, Address(host, port))
            except NetworkError:
                pass  # somebody else has it now
            else:
                return
        bound = await self._start_endpoint(nursery, Address(host, 0))
        self._home.save_json(PORT_DOCUMENT, {"port": bound})

    async def _start_endpoint(self, nursery: trio.Nursery, address: Address) -> int:
        try:
            bound: int = await nursery.start(self._endpoint.run, address.host, address.port)
        except ListenFailed as error:
            raise NetworkError(str(error)) from None
        return bound

    async def _open_gateway(self, nursery: trio.Nursery) -> None:
        http = self._http
        if http is None:
            return
        assert http.host is not None
        standing = self._orchestrator.standing if self._orchestrator else None
        view = standing or Lending(self.status)
        routes = self._equipment.model_routes if self._equipment else None
        further = routes.routes() if routes else ()
        port: int = await nursery.start(serve_gateway, view, http.host, http.port, further)
        url = f"http://{Address(http.host, port)}"
        text = f"its models: {url}/api/v1/models/registry"
        if standing:
            standing.url = url
            text = f"chat endpoint: {url}/v1 (answers once a model is loaded)"
        self._emit(Event(Kind.NODE, text, {"url": url}))

    async def _look_outside(self) -> None:
        """An invite is to say where this node is reached from outside; who joins need not wait."""
        if self._config.joins:
            return
        with trio.move_on_after(FIRST_LOOK_S):
            await self._endpoint.outside.known.wait()
            if self._portmap:
                await self._portmap.settled.wait()

    def _introduce_node(self) -> None:
        me = self._endpoint.peer
        places = [one for one in self._endpoint.candidates() if one.via is None]
        where = ", ".join(str(place) for place in places)
        text = f"node {self._membership.name} ({me.short}) listens at {where or 'no address'}"
        self._emit(Event(Kind.NODE, text, {"peer": str(me), "name": self._membership.name}))
        if self._desk:
            self._tell_what_is_lent(self._desk)
        if self._config.relays:
            text = "relays for the members of its meshes: it carries what it cannot read"
            self._emit(Event(Kind.NODE, text, {"relays": True}))
        if not self._config.joins:
            other = "mesh serve" if self._desk and not self._orchestrator else "mesh worker"
            token = encode(self._first_invite())
            line = f"{other} join={token}"
            text = f"on another machine, run:\n{line}"
            if not (self._desk or self._orchestrator):
                text += f"\nand on a third:\nmesh serve join={token}"
            self._emit(Event(Kind.INVITE, text, {"line": line}))

    def _tell_what_is_lent(self, desk: LeaseDesk) -> None:
        facts = desk.facts()
        devices = ", ".join(
            f"{device.name} ({device.description}, {human_bytes(device.total_bytes)})"
            for device in facts.devices
        )
        text = f"lends {human_bytes(facts.usable_bytes)} on {devices}"
        self._emit(Event(Kind.NODE, text, {"usable_bytes": facts.usable_bytes}))
        text = f"sandbox: {desk.sandbox.describe()}"
        kind = Kind.WARNING if desk.sandbox.is_amiss else Kind.NODE
        self._emit(Event(kind, text, {"sandbox": list(desk.sandbox.standing)}))
        text = f"models here: {', '.join(facts.models) or 'none'}"
        self._emit(Event(Kind.MODELS, text, {"models": list(facts.models)}))

    def _map_ports(self, nursery: trio.Nursery) -> None:
        """Has the router forward our ports, unless only near machines may reach the node."""
        if not self._config.portmap or self._config.offline or self._only_this_machine:
            return
        portmap = self._portmap = PortMap(
            self._endpoint.bound_ports, only_host=self._only_host, tell=self._tell_port_mapping
        )
        self._endpoint.add_candidates(portmap.candidates)
        nursery.start_soon(portmap.run)

    def _tell_port_mapping(self, status: PortMapStatus) -> None:
        self._endpoint.tell_candidates_changed()
        if status.router is not None:
            text = f"port mapping: {describe(status)}"
            self._emit(Event(Kind.NODE, text, {"port_mapping": status.row()}))

    @property
    def _only_host(self) -> str | None:
        """The one address that we listen on; None: every one."""
        host = self._config.listen.host if self._config.listen else None
        return None if not host or ipaddress.ip_address(host).is_unspecified else host

    @property
    def _only_this_machine(self) -> bool:
        return self._only_host is not None and ipaddress.ip_address(self._only_host).is_loopback

    def _join_neighbours(self, nursery: trio.Nursery) -> None:
        """Announces the node on the local network, unless only this machine may reach it."""
        if not self._config.mdns or self._only_this_machine:
            return
        # Imported where it is used: it brings an event loop of its own along.
        from meshnode.neighbours import Neighbours

        dialling = self._connections.dialling
        neighbours = Neighbours(
            self._endpoint, self._membership, dialling, self._emit, self._only_host
        )
        self._connections.look_around = neighbours.look_around
        nursery.start_soon(neighbours.run)

    def _round_trips(self) -> list[tuple[PeerId, float]]:
        measured = [(one.peer, one.rtt_s) for one in self._connections.introduced()]
        return [(peer, rtt_s) for peer, rtt_s in measured if rtt_s is not None]

    # -- requests of other commands -----------------------------------------------------------

    def _first_invite(self) -> Token:
        return self._administration.first_invite(DEFAULT_INVITE_LIFETIME_S, DEFAULT_INVITE_USES)

    async def accept(self, code: str) -> None:
        """Follows a reply code that was pasted here; what comes of it is an event."""
        try:
            where = await self._connections.replies.accept(code)
        except MeshError as error:
            self._emit(Event(Kind.WARNING, str(error)))
        else:
            self._emit(Event(Kind.NODE, f"the other machine is heard at {where}; it joins now"))

    async def _answer_accept(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"address": await self._connections.replies.accept(str(request.get("code", "")))}

    async def _answer_members(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._administration.answer(request)

    async def _answer_status(self, _request: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.status()


def _endpoint_of(identity: Identity, membership: Membership, config: NodeConfig) -> Endpoint:
    network = NearNetwork() if config.offline else HostNetwork()
    return Endpoint(
        identity,
        authorize=membership.authorize,
        policy=AddressPolicy(only=network.is_near if config.offline else None),
        network=network,
        transports=config.transports or tuple(LINK_KINDS),
        stun=None if config.offline else config.stun,
        ice=IceServers(turn=None if config.offline else config.turn),
        is_introductory=(OPEN_TO_ALL | OPEN_TO_MEMBERS).__contains__,
        carries=Carries.TRAFFIC if config.relays else Carries.INTRODUCTIONS,
        tcp_port=config.tcp_port,
    )


def _emptied(folder: Path) -> Path:
    """Of what a node that was killed left there: its lock is ours."""
    for leftover in folder.iterdir():
        _remove(leftover)
    return folder


def _remove(leftover: Path) -> None:
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


def node_name(given: str | None) -> str:
    """The name given with --name, else the machine's without its domain. Raises `UsageError`."""
    name = given if given is not None else platform.node().split(".")[0][:MAX_NAME_CHARS] or "node"
    odd = not name.isprintable() or any(char in name for char in " ,=:.") or name == "local"
    if odd or not 1 <= len(name) <= MAX_NAME_CHARS:
        raise UsageError(
            f"{name!r} cannot be a node's name: use up to {MAX_NAME_CHARS} letters, digits and "
            "dashes, and not 'local'"
        )
    return name
