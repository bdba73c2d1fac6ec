"""Two machines in networks that nobody chose: where there is a path, they find it.

What is expected follows from the networks alone, by the rules of `is_possible`; the punchers know
no more than what they are told from outside.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

from tests.lab.datagrams import FakeHost, Weather, World
from tests.lab.nats import Internet, Kind, Network, Router
from tests.lab.punchers import Side, a_side, an_internet, carries, meet
from tunnels.consent import UNASKED_BYTES
from tunnels.probe import SALVO_UNASKED_BYTES
from tunnels.salvo import FAN_SOCKETS, SPRAYED_PORTS

TRIES = 3  # as improve.py does, a minute apart
PAUSE_S = 61.0
ON_WIRE_BYTES = 92
# A leaky router is left out: whether it works depends on the instant, see test_punch.py.
TRANSLATING = [kind for kind in Kind if kind not in (Kind.FIREWALL, Kind.LEAKY_HOME)]


@dataclass(frozen=True)
class Place:
    """Where one machine is. routers: from the inside out."""

    routers: tuple[Kind, ...]
    ipv6: bool
    stealth: bool
    blocks_udp: bool

    @property
    def is_hard(self) -> bool:
        return any(kind.is_hard for kind in self.routers)

    def __str__(self) -> str:
        words = [kind.name.lower() for kind in self.routers] or ["open"]
        flags = {"ipv6": self.ipv6, "stealth": self.stealth, "no udp": self.blocks_udp}
        return " in ".join(words) + "".join(f", {word}" for word, is_so in flags.items() if is_so)


@dataclass(frozen=True)
class Layout:
    """carrier: both are behind this one too, with or without hairpin."""

    places: tuple[Place, Place]
    carrier: Kind | None
    hairpin: bool
    one_lan: bool
    timeout_s: float
    weather: Weather
    skew_s: float
    seed: int

    def __str__(self) -> str:
        carrier = f" behind one {self.carrier.name.lower()}" if self.carrier else ""
        return f"{self.places[0]} × {self.places[1]}{carrier}, {self.weather}"

    @property
    def is_possible(self) -> bool:
        if self.one_lan:
            return True
        if any(one.blocks_udp and one.routers for one in self.places):
            return False
        if all(one.ipv6 for one in self.places):
            return True
        both_are_hard = all(one.is_hard for one in self.places)
        if self.carrier is None:
            return not both_are_hard
        # Below one carrier, who is not behind another router is reached straight, by those that
        # its own firewall lets in; all others meet at the carrier's outer side, if it hairpins.
        inner = [one for one in self.places if not one.routers]
        if len(inner) == 2 or (inner and not inner[0].stealth):
            return True
        return self.hairpin and not self.carrier.is_hard and not both_are_hard

    @property
    def may_be_hard(self) -> bool:
        """Whether a salvo may be fired. Behind one Linux router, two sockets with one port look
        hard: their ports clash, and it chooses another for each destination."""
        both = [self.carrier, *(self.places[0].routers if self.one_lan else ())]
        kinds = [*self.places[0].routers, *self.places[1].routers, self.carrier]
        return Kind.HOME in both or Kind.SYMMETRIC in kinds


places = st.builds(
    Place,
    st.lists(st.sampled_from(TRANSLATING), max_size=2).map(tuple),
    st.booleans(),
    st.booleans(),
    st.sampled_from([False, False, False, True]),
)
weathers = st.builds(
    Weather,
    delay_s=st.sampled_from([0.001, 0.02, 0.15]),
    jitter_s=st.sampled_from([0.0, 0.02, 0.1]),
    loss=st.sampled_from([0.0, 0.01, 0.1]),
    duplication=st.sampled_from([0.0, 0.2]),
)
layouts = st.builds(
    Layout,
    places=st.tuples(places, places),
    carrier=st.sampled_from([None, None, None, *TRANSLATING]),
    hairpin=st.booleans(),
    one_lan=st.sampled_from([False, False, False, True]),
    timeout_s=st.sampled_from([5.0, 30.0, 120.0]),
    weather=weathers,
    skew_s=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 2**16),
)


def build(internet: Internet, layout: Layout) -> list[FakeHost]:
    outside: Network | None = None
    if layout.carrier is not None:
        carrier = Router("11.0.99.1", layout.carrier, layout.hairpin, layout.timeout_s)
        outside = internet.network(carrier)
    hosts: list[FakeHost] = []
    for number, place in enumerate(layout.places, 1):
        network = outside
        for level, kind in enumerate(reversed(place.routers)):
            is_top = network is None
            address = f"11.0.{number}.1" if is_top else f"100.64.{number}.{level}"
            router = Router(address, kind, layout.hairpin, layout.timeout_s)
            router.blocks_udp = place.blocks_udp
            network = internet.network(router, network)
        if layout.one_lan and hosts:
            network = internet.network_of(hosts[0])
        own = f"192.168.{number}.2" if network not in (None, internet.top) else f"11.1.{number}.2"
        ipv6 = (f"2001:db8:{number}::2",) if place.ipv6 else ()
        hosts.append(internet.host(own, *ipv6, behind=network, stealth=place.stealth))
    return hosts


@asynccontextmanager
async def two_in(layout: Layout) -> AsyncIterator[list[Side]]:
    async with an_internet(World(layout.weather, layout.seed)) as internet, AsyncExitStack() as at:
        sides = [
            await at.enter_async_context(a_side(host, layout.seed))
            for host in build(internet, layout)
        ]
        async with trio.open_nursery() as nursery:
            for side in sides:
                nursery.start_soon(side.look_into_mirrors)
        yield sides


async def find(layout: Layout, dialler: Side, listener: Side) -> int | None:
    """At which try both had found a path that carries."""
    for number in range(TRIES):
        ours, theirs = await meet(dialler, listener, bytes([number]) * 32, layout.skew_s)
        if (
            ours.address is not None
            and theirs.address is not None
            and await carries(dialler, ours.address, listener)
        ):
            return number + 1
        await trio.sleep(PAUSE_S)
    return None


def check_bounds(layout: Layout, side: Side, tries: int) -> None:
    salvo = max(SPRAYED_PORTS, FAN_SOCKETS) * ON_WIRE_BYTES + SALVO_UNASKED_BYTES
    most = UNASKED_BYTES + (salvo if layout.may_be_hard else 0)
    assert max(side.witness.unasked_bytes.values(), default=0) <= most * tries
    assert len(side.puncher._searches) <= TRIES


# A failure is shown as it was found: to shrink one takes longer than to read it.
@pytest.mark.usefixtures("steady_processor")
@settings(max_examples=150, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(layouts)
def test_where_there_is_a_path_they_find_it(layout: Layout) -> None:
    async def story() -> None:
        async with two_in(layout) as (dialler, listener):
            sockets = len(dialler.host.world._sockets)
            tries = await find(layout, dialler, listener)
            for side in (dialler, listener):
                check_bounds(layout, side, tries or TRIES)
            assert len(dialler.host.world._sockets) <= sockets + 1
            assert (tries is not None) == layout.is_possible, layout
            event(
                f"found at try {tries}" + (", where it may take luck" if layout.may_be_hard else "")
            )

    trio.run(story, clock=trio.testing.MockClock(autojump_threshold=0))
