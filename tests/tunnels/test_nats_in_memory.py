"""The NATs that other tests are run against: each is what its name says, seen from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from tests.lab.datagrams import FakeHost, FakeSocket, World
from tests.lab.nats import Internet, Kind, Network, Router
from tunnels.binding import Address

HOME = "11.0.1.1"
NATS = [kind for kind in Kind if kind is not Kind.FIREWALL]
ONE_MAPPING = [Kind.FULL_CONE, Kind.ADDRESS_RESTRICTED, Kind.PORT_RESTRICTED]


@dataclass
class Setting:
    """alice behind a router, bob outside with two ports, carol outside elsewhere."""

    internet: Internet
    router: Router
    network: Network
    alice: FakeSocket
    bob: FakeSocket
    bobs_other: FakeSocket
    carol: FakeSocket

    async def arrives(self, sender: FakeSocket, to: Address, at: FakeSocket) -> Address | None:
        """The address that it is seen to come from, if it arrives."""
        at._arrived.clear()
        sender.send([b"hello"], to)
        await trio.sleep(1)
        return at._arrived[-1][1] if at._arrived else None

    async def as_seen_by(self, outside: FakeSocket) -> Address:
        seen = await self.arrives(self.alice, outside.local, outside)
        assert seen is not None
        return seen

    async def lets_in(self, outside: FakeSocket, to: Address) -> bool:
        return await self.arrives(outside, to, self.alice) is not None


@asynccontextmanager
async def behind(kind: Kind, **options: object) -> AsyncIterator[Setting]:
    world = World()
    internet = Internet(world)
    router = Router(HOME, kind, **options)  # type: ignore[arg-type]
    network = internet.network(router)
    alice = internet.host("192.168.1.2", behind=network)
    bob, carol = internet.host("11.0.0.2"), internet.host("11.0.0.3")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.run)
        sockets = [alice.bind(None, 5), bob.bind(None, 1), bob.bind(None, 2), carol.bind(None, 3)]
        yield Setting(internet, router, network, *sockets)
        nursery.cancel_scope.cancel()


Clock = trio.testing.MockClock


@pytest.mark.parametrize("kind", NATS)
async def test_what_leaves_bears_the_routers_address_and_is_answered(
    kind: Kind, autojump_clock: Clock
) -> None:
    async with behind(kind) as lab:
        seen = await lab.as_seen_by(lab.bob)
        assert seen[0] == HOME
        assert (seen[1] == 5) == (kind is not Kind.SYMMETRIC)
        assert await lab.lets_in(lab.bob, seen)


@pytest.mark.parametrize("kind", NATS)
async def test_nobody_comes_in_who_was_not_sent_to(kind: Kind, autojump_clock: Clock) -> None:
    async with behind(kind) as lab:
        assert not await lab.lets_in(lab.bob, (HOME, 5))
        assert not await lab.lets_in(lab.bob, lab.alice.local), "private addresses lead nowhere"


@pytest.mark.parametrize("kind", NATS)
async def test_who_else_comes_in_at_a_port_that_is_open(kind: Kind, autojump_clock: Clock) -> None:
    async with behind(kind) as lab:
        seen = await lab.as_seen_by(lab.bob)
        restricted = (Kind.FULL_CONE, Kind.ADDRESS_RESTRICTED)
        assert await lab.lets_in(lab.bobs_other, seen) == (kind in restricted)
        assert await lab.lets_in(lab.carol, seen) == (kind is Kind.FULL_CONE)


@pytest.mark.parametrize("kind", NATS)
async def test_only_a_symmetric_nat_shows_everybody_another_port(
    kind: Kind, autojump_clock: Clock
) -> None:
    async with behind(kind) as lab:
        seen = {await lab.as_seen_by(one) for one in (lab.bob, lab.bobs_other, lab.carol)}
        assert len(seen) == (3 if kind.is_hard else 1)


async def test_on_a_leaky_router_who_comes_too_early_shifts_the_port(autojump_clock: Clock) -> None:
    for kind, kept in ((Kind.HOME, True), (Kind.LEAKY_HOME, False)):
        async with behind(kind) as lab:
            await lab.lets_in(lab.bob, (HOME, 5))
            assert (await lab.as_seen_by(lab.bob) == (HOME, 5)) == kept
            assert await lab.as_seen_by(lab.carol) == (HOME, 5)


@pytest.mark.parametrize("kind", NATS)
async def test_two_inside_with_one_port_do_not_share_it(kind: Kind, autojump_clock: Clock) -> None:
    async with behind(kind) as lab:
        twin = lab.internet.host("192.168.1.3", behind=lab.network).bind(None, 5)
        first, second = (
            await lab.as_seen_by(lab.bob),
            await lab.arrives(twin, lab.bob.local, lab.bob),
        )
        assert second is not None
        assert first != second
        assert await lab.arrives(lab.bob, second, twin)


@pytest.mark.parametrize("kind", NATS)
async def test_silence_is_forgetting_and_traffic_either_way_is_not(
    kind: Kind, autojump_clock: Clock
) -> None:
    async with behind(kind, timeout_s=5.0) as lab:
        seen = await lab.as_seen_by(lab.bob)
        for _ in range(4):
            await trio.sleep(3)
            assert await lab.lets_in(lab.bob, seen)
        await trio.sleep(6)
        assert not await lab.lets_in(lab.bob, seen)


@pytest.mark.parametrize("kind", NATS)
async def test_after_a_restart_the_port_is_another(kind: Kind, autojump_clock: Clock) -> None:
    async with behind(kind) as lab:
        seen = await lab.as_seen_by(lab.bob)
        lab.router.rebind()
        assert not await lab.lets_in(lab.bob, seen)
        assert await lab.as_seen_by(lab.bob) != seen


@pytest.mark.parametrize("hairpin", [True, False])
async def test_hairpin(hairpin: bool, autojump_clock: Clock) -> None:
    async with behind(Kind.FULL_CONE, hairpin=hairpin) as lab:
        seen = await lab.as_seen_by(lab.bob)
        inside = lab.internet.host("192.168.1.3", behind=lab.network).bind(None, 6)
        assert (await lab.arrives(inside, seen, lab.alice) is not None) == hairpin
        assert await lab.arrives(inside, lab.alice.local, lab.alice) == inside.local


async def test_two_nats_in_a_row(autojump_clock: Clock) -> None:
    async with behind(Kind.PORT_RESTRICTED) as lab:
        inner = lab.internet.network(Router("192.168.1.9", Kind.HOME), lab.network)
        dave = lab.internet.host("10.0.0.2", behind=inner).bind(None, 7)
        assert await lab.arrives(dave, lab.bob.local, lab.bob) == (HOME, 7)
        assert await lab.arrives(lab.bob, (HOME, 7), dave) == lab.bob.local
        assert await lab.arrives(lab.carol, (HOME, 7), dave) is None
        assert await lab.arrives(dave, lab.alice.local, lab.alice) == ("192.168.1.9", 7)


async def test_blocked_udp_and_a_stealthy_host(autojump_clock: Clock) -> None:
    async with behind(Kind.HOME, blocks_udp=True) as lab:
        assert await lab.arrives(lab.alice, lab.bob.local, lab.bob) is None
        quiet = lab.internet.host("11.0.0.9", stealth=True).bind(None, 9)
        assert await lab.arrives(lab.bob, quiet.local, quiet) is None
        await lab.arrives(quiet, lab.bob.local, lab.bob)
        assert await lab.arrives(lab.bob, quiet.local, quiet)
        assert await lab.arrives(lab.bobs_other, quiet.local, quiet) is None


@pytest.mark.parametrize("kind", [Kind.FIREWALL, Kind.HOME])
async def test_ipv6_is_filtered_and_not_translated(kind: Kind, autojump_clock: Clock) -> None:
    async with behind(kind) as lab:
        both = lab.internet.host("192.168.1.7", "2001:db8:1::7", behind=lab.network).bind(None, 7)
        far = lab.internet.host("2001:db8:2::1").bind(None, 8)
        assert await lab.arrives(far, ("2001:db8:1::7", 7), both) is None
        assert await lab.arrives(both, far.local, far) == ("2001:db8:1::7", 7)
        assert await lab.arrives(far, ("2001:db8:1::7", 7), both) == far.local
        assert await lab.arrives(lab.bob, far.local, far) is None, "no family in common"


async def test_tcp_leaves_and_does_not_come_in(autojump_clock: Clock) -> None:
    async with behind(Kind.FULL_CONE) as lab:
        alice = FakeHost(lab.internet.world, ["192.168.1.2"])
        bob = FakeHost(lab.internet.world, ["11.0.0.2"])
        listener, hidden = bob.listen(None, 80), alice.listen(None, 80)
        await alice.connect(("11.0.0.2", 80))
        assert (await listener.accept()).remote[0] == HOME
        with trio.move_on_after(60) as patience:
            await bob.connect((HOME, 80))
        assert patience.cancelled_caught
        hidden.close()
