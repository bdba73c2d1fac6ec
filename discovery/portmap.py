"""The node's ports, mapped on the router: peers beyond it reach them as if they were outside.

PCP, NAT-PMP and UPnP are asked at once; one at a time maps, the first that answers first, so that
none takes away what another has made. What is given is renewed at half its life, and asked for anew
when the router has restarted, is another one, or the network has changed; it is taken away when the
node stops. A lost mapping costs a candidate, never a session.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from discovery.gateway import Gateway, find_gateway
from discovery.mappers import Mapper, MappingFailed, all_mappers
from discovery.mapping import Mapping, Transport, uselessness
from tunnels.interfaces import watch_interfaces
from tunnels.network import HostNetwork, Network
from tunnels.peer import Candidate

CHECK_S = 60.0  # whether the router still has what it gave
FIRST_PAUSE_S = 5.0  # after a refusal or silence, and twice as long each time
LAST_PAUSE_S = 600.0
SETTLE_S = 1.0  # a router that comes back is not at once what it will be
GOODBYE_S = 2.0
_TRANSPORTS = {"quic": Transport.UDP, "tcp": Transport.TCP}
NO_GATEWAY = "this machine has no IPv4 router to ask"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PortMapStatus:
    """How port mapping stands. by: "PCP", "NAT-PMP", "UPnP". problem: one sentence, when there are
    no mappings or not all."""

    router: str | None = None
    by: str | None = None
    mappings: tuple[Mapping, ...] = ()
    problem: str | None = None

    def row(self) -> dict[str, object]:
        """JSON-ready."""
        mapped = [
            {"transport": one.transport.name.lower(), "host": one.host, "port": one.port}
            for one in self.mappings
        ]
        return {"router": self.router, "by": self.by, "mapped": mapped, "problem": self.problem}


class PortMap:
    """I keep this node's ports mapped, and say where they are reached from outside.

    ports: those to map, by kind of link. only_host: the one address that we listen on; None: every
    one. tell: called whenever the status has become another.
    """

    def __init__(
        self,
        ports: Callable[[], dict[str, int]],
        *,
        only_host: str | None = None,
        network: Network | None = None,
        gateway: Callable[[], Awaitable[Gateway | None]] = find_gateway,
        watch: Callable[[], Awaitable[None]] | None = None,
        tell: Callable[[PortMapStatus], None] = lambda _status: None,
    ) -> None:
        """watch: returns at the next change of the network; None: of this machine's interfaces."""
        self.status = PortMapStatus()
        self.settled = trio.Event()  # the first look is over, whatever came of it
        self._ports = ports
        self._only_host = only_host
        self._network = network or HostNetwork()
        self._gateway = gateway
        self._mapper: Mapper | None = None  # of what the router holds for us
        self._held: dict[Transport, Mapping] = {}
        self._watch = watch
        self._tell = tell
        self._changed = trio.Event()

    def candidates(self) -> list[Candidate]:
        """For `Endpoint.add_candidates`."""
        kinds = {transport: kind for kind, transport in _TRANSPORTS.items()}
        return [
            Candidate(kinds[one.transport], one.host, one.port, "mapped")
            for one in self.status.mappings
        ]

    async def run(self) -> None:
        """Until cancelled; then the mappings are taken away, as far as the router hears of it."""
        with _watched(self._watch) as wait_changed:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow, wait_changed)
                pause_s = FIRST_PAUSE_S
                while True:
                    changed = self._changed
                    if await self._serve():
                        pause_s = FIRST_PAUSE_S
                        continue
                    with trio.move_on_after(pause_s) as pause:
                        await changed.wait()
                        await trio.sleep(SETTLE_S)
                    pause_s = min(2 * pause_s, LAST_PAUSE_S)
                    if not pause.cancelled_caught:
                        pause_s = FIRST_PAUSE_S

    async def _follow(self, wait_changed: Callable[[], Awaitable[None]]) -> None:
        while True:
            await wait_changed()
            self._changed.set()
            self._changed = trio.Event()

    async def _serve(self) -> bool:
        """From finding the router to losing it; True when another is to be found at once."""
        gateway = await self._gateway()
        if gateway is None:
            self._stand(PortMapStatus(problem=NO_GATEWAY))
            return False
        if self._only_host not in (None, gateway.ours):
            problem = f"this node listens on {self._only_host}, where the router does not reach it"
            self._stand(PortMapStatus(gateway.address, problem=problem))
            return False
        try:
            mapper = await self._obtain(gateway)
            await self._keep(gateway, mapper)
        except MappingFailed as error:
            self._stand(PortMapStatus(gateway.address, problem=str(error)))
            return False
        except Exception:  # what a router provokes must not end the node
            log.exception("port mapping failed")
            problem = "port mapping broke: the log says how; forward the port by hand meanwhile"
            self._stand(PortMapStatus(gateway.address, problem=problem))
            return False
        finally:
            await self._take_away()
        return True

    async def _keep(self, gateway: Gateway, mapper: Mapper) -> None:
        """Returns when another router is there. Raises MappingFailed when this one gives no
        more."""
        while True:
            changed = self._changed
            self._stand_with(gateway, mapper)
            mappings = tuple(self._held.values())
            renew_at_s = trio.current_time() + min(one.renew_after_s for one in mappings)
            while trio.current_time() < renew_at_s:
                with trio.move_on_at(min(renew_at_s, trio.current_time() + CHECK_S)):
                    await changed.wait()
                    await trio.sleep(SETTLE_S)
                changed = self._changed
                if await self._gateway() != gateway:
                    return
                if not await mapper.keeps(mappings):
                    log.info("the router has lost its port mappings: asking again")
                    break
            await self._map_all(mapper)

    async def _obtain(self, gateway: Gateway) -> Mapper:
        """The first that works, with what it mapped in `_held`. Raises MappingFailed with what each
        way of asking came to."""
        mappers = all_mappers(self._network, gateway)
        send, receive = trio.open_memory_channel[tuple[Mapper, str | None]](len(mappers))
        failures: dict[str, str] = {}

        async def find(mapper: Mapper) -> None:
            try:
                await mapper.find()
            except MappingFailed as error:
                send.send_nowait((mapper, str(error)))
            else:
                send.send_nowait((mapper, None))

        async with trio.open_nursery() as nursery:
            for mapper in mappers:
                nursery.start_soon(find, mapper)
            for _ in mappers:
                mapper, failure = await receive.receive()
                try:
                    if failure is None:
                        await self._map_all(mapper)
                        nursery.cancel_scope.cancel()
                        return mapper
                except MappingFailed as error:
                    failure = str(error)
                    await self._take_away()
                failures[mapper.name] = failure
        raise MappingFailed(_in_words(gateway, failures))

    async def _map_all(self, mapper: Mapper) -> None:
        """Maps our ports, or renews what is held. Raises MappingFailed when not one is of use."""
        self._mapper = mapper
        failure = "there is no port to map"
        for transport, port in self._wanted().items():
            held = self._held.pop(transport, None)
            try:
                one = await mapper.map(transport, port, held.port if held else port)
            except MappingFailed as error:
                failure = str(error)
                continue
            self._held[transport] = one
            if (useless := uselessness(one.host)) is not None:
                raise MappingFailed(useless)
        if not self._held:
            raise MappingFailed(failure)

    async def _take_away(self) -> None:
        """As far as the router hears of it."""
        mapper, held = self._mapper, tuple(self._held.values())
        self._held.clear()

        async def one(mapping: Mapping) -> None:
            assert mapper is not None
            try:
                await mapper.unmap(mapping)
            except MappingFailed as error:
                log.debug("a port mapping could not be taken away: %s", error)

        with trio.move_on_after(GOODBYE_S, shield=True):
            async with trio.open_nursery() as nursery:
                for mapping in held:
                    nursery.start_soon(one, mapping)

    def _wanted(self) -> dict[Transport, int]:
        ports = self._ports()
        return {_TRANSPORTS[kind]: ports[kind] for kind in _TRANSPORTS if kind in ports}

    # --- what is told -------------------------------------------------------------------

    def _stand_with(self, gateway: Gateway, mapper: Mapper) -> None:
        missing = [one.name for one in self._wanted() if one not in self._held]
        problem = f"the router maps no {' and no '.join(missing)} port" if missing else None
        held = tuple(self._held.values())
        self._stand(PortMapStatus(gateway.address, mapper.name, held, problem))

    def _stand(self, status: PortMapStatus) -> None:
        changed, self.status = status != self.status, status
        self.settled.set()
        if changed:
            log.info("port mapping: %s", describe(status))
            self._tell(status)


@contextmanager
def _watched(
    watch: Callable[[], Awaitable[None]] | None,
) -> Iterator[Callable[[], Awaitable[None]]]:
    if watch is not None:
        yield watch
        return
    with watch_interfaces() as interfaces:
        yield interfaces.wait_changed


# --- in words -----------------------------------------------------------------------------------


def _in_words(gateway: Gateway, failures: dict[str, str]) -> str:
    silent = "it does not answer"
    told = {name: why for name, why in failures.items() if why != silent}
    if not told:
        return (
            f"the router {gateway.address} maps no ports: switch on UPnP, NAT-PMP or PCP in it, "
            "or forward this node's port by hand"
        )
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    return "; ".join(f"{name}: {why}" for name, why in told.items())


def describe(status: PortMapStatus) -> str:
    """One line for people."""
    if not status.mappings:
        return status.problem or "not tried yet"
    ports = ", ".join(f"{one.transport.name} {one.host}:{one.port}" for one in status.mappings)
    text = f"the router forwards {ports} ({status.by})"
    return f"{text}; {status.problem}" if status.problem else text


async def survey(network: Network | None = None) -> PortMapStatus:
    """What the router would do, for `mesh doctor`: maps nothing. Takes up to 6 s where nothing
    answers. `by` names all ways that work."""
    gateway = await find_gateway()
    if gateway is None:
        return PortMapStatus(problem=NO_GATEWAY)
    failures: dict[str, str] = {}
    mappers = all_mappers(network or HostNetwork(), gateway)

    async def find(mapper: Mapper) -> None:
        try:
            await mapper.find()
        except MappingFailed as error:
            failures[mapper.name] = str(error)

    async with trio.open_nursery() as nursery:
        for mapper in mappers:
            nursery.start_soon(find, mapper)
    working = [mapper.name for mapper in mappers if mapper.name not in failures]
    if working:
        return PortMapStatus(gateway.address, ", ".join(working))
    return PortMapStatus(gateway.address, problem=_in_words(gateway, failures))
